"""Chooses how a site is solved, and holds every other threshold for a merge's decisions.

A :class:`Thresholds` holds the numbers; docs/decisions.md gives the evidence for them. A merge uses
:data:`THRESHOLDS` unless it is given others. Constants that decide nothing are defined where they
are used: an algorithm's precision (:mod:`..linalg`), memory margins and pieces
(:mod:`..activations.memory`), and prompts and sizes of rows (:mod:`..hosts.rows` and
:mod:`..hosts.sizes`).
"""

from __future__ import annotations

from dataclasses import dataclass

from ..lora import SiteChanges
from .moments import OTHERS, AdapterMoments, OutputMoments, find_directions
from .problem import MemoryEstimate, Objective, Pull, Reduction, RegressionSpec, SiteContext


@dataclass(frozen=True)
class Thresholds:
    """Thresholds, and the choices based on them."""

    # TᵀX̃ is restricted to some output directions if it has more entries than this
    small_target: int = 1 << 16
    # and if that takes so many times fewer operations.
    directions_gain: float = 1.5
    # Directions: this many times the rank,
    reserve: float = 1.25
    # plus these,
    more_directions: int = 16
    # found from as many tokens for each;
    tokens_a_direction: int = 2
    # for images, from the tokens of so many rows of every concept.
    sample_rows: int = 16

    # Tokens of an image's row: at least so many,
    least_row_tokens: int = 128
    # or as many as give every concept so many for each input of a site.
    tokens_an_input: int = 32

    # α of eq. 7 where samples are enough;
    ridge: float = 1e-6
    # with fewer it grows with this power of the shortfall,
    ridge_power: float = 5.0
    # up to this, and pulls to the mean at the changes' own size.
    most_ridge: float = 1e-2
    # Enough of each of two LoRAs, proportionally fewer of each of more.
    enough_samples: int = 50

    # Largest ‖ΔW‖ as a multiple of √LoRAs · ‖W0‖,
    bound: float = 0.8
    # and of what the LoRAs have there together, (Σ ‖ΔW_i‖²)^½;
    growth: float = 6.0
    # both are less, by a cube root, below so many samples of each.
    bound_samples: float = 25.0

    # Share of the rows that show other strengths and other LoRAs beside.
    conditions: float = 0.25

    # Models of texts: RegMean's factor on off-diagonal entries,
    shrink: float = 0.7
    # where no concept has so many tokens for each input.
    few_tokens: float = 4.0

    # Repair of two LoRAs: share of a feed-forward's hidden units,
    repair_share: float = 0.5
    # and at most so many of any.
    repair_width: int = 6144

    # Most barriers in a block in which rows wait: small blocks, large ones.
    blocks: tuple[int, ...] = (3, 8)
    # A block is run again if that gives its first output within this,
    # or, in half precision, within eight units of rounding.
    replay_error: float = 1e-3

    # Steps through the denoiser for each LoRA and once more,
    steps_each: int = 20
    # and at most so many.
    most_steps: int = 100
    # Rows of a step,
    batch: int = 16
    # the root mean square of its first updates, as a multiple of a factor's,
    rate: float = 0.02
    # and the weight of blocks' outputs in its loss, where the final one has 1.
    hints: float = 3.0

    def choose(self, context: SiteContext, fit: RegressionSpec, objective: Objective) -> Reduction:
        """The reduction for a site."""
        if objective == "adapter":
            return AdapterMoments(context, fit.weighting)
        most = fit.rank if isinstance(fit.rank, int) else 0
        count = self.directions(*context.changes.shape, max(context.changes.rank, most))
        directions = None
        if count is not None and context.sample is not None:
            targets = context.sample(self.tokens_a_direction * count)
            # Where they are not finite, the solve reports it.
            finite = [rows.nan_to_num(0.0, 0.0, 0.0) for rows in targets]
            directions = find_directions(context.changes, finite, count)
        return OutputMoments(context, fit.weighting, directions)

    def bytes(
        self,
        changes: SiteChanges,
        fit: RegressionSpec,
        objective: Objective,
        itemsize: int,
        *,
        sweep: bool,
    ) -> MemoryEstimate:
        """Most bytes that :meth:`choose` uses at a site; ``itemsize`` is that of its moments."""
        if objective == "adapter":
            return AdapterMoments.bytes(changes, itemsize)
        count = self.directions(*changes.shape, changes.rank) if sweep else None
        rows = None if count is None else min(changes.shape[0], count + OTHERS)
        return OutputMoments.bytes(changes, itemsize, rows, fit.dtype)

    def directions(self, out: int, width: int, rank: int) -> int | None:
        """The number of directions that represent all ``out`` outputs at a site that keeps ``rank``
        of them; None if all of them hardly cost more."""
        count = int(rank * self.reserve) + self.more_directions
        gains = 2 * self.directions_gain * count * (out + width) <= 2 * out * width
        return count if out * width > self.small_target and gains else None

    def row_tokens(self, width: int, rows: int) -> int:
        """The number of tokens per row, of a concept's ``rows``, that suffices for ``width``
        inputs."""
        return max(self.least_row_tokens, -(-self.tokens_an_input * width // rows))

    def steps_for(self, loras: int) -> int:
        """The number of steps through the denoiser for that many LoRAs. What a single LoRA does is
        its own change, which the closed form reaches."""
        return min(self.steps_each * (loras + 1), self.most_steps) if loras > 1 else 0

    def ridge_for(self, samples: int, timesteps: int, loras: int) -> tuple[float, Pull]:
        """α and the pull for that many samples of each of that many LoRAs. With few samples the
        pull decides much of a merge, and the mean of unlike changes is too small."""
        # As many of each of two LoRAs at four timesteps: a site is fitted to the rows of all LoRAs,
        # and rows of one sample are similar.
        effective = samples * max(loras, 2) / 2 * (timesteps / 4) ** 0.25
        few = max(1.0, self.enough_samples / effective)
        ridge = max(self.ridge, min(self.ridge * few**self.ridge_power, self.most_ridge))
        return ridge, "size" if effective < self.enough_samples else "mean"


THRESHOLDS = Thresholds()
