"""Chooses how a site is solved, and holds every other threshold for a merge's decisions.

A :class:`Thresholds` holds the numbers; docs/decisions.md gives the evidence for them. A merge uses
:data:`THRESHOLDS` unless it is given others. Constants that decide nothing are defined where they
are used: an algorithm's precision (:mod:`..linalg`), memory margins and pieces
(:mod:`..activations.memory`), and prompts and sizes of rows (:mod:`..hosts.rows` and
:mod:`..hosts.sizes`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..lora import SiteChanges
from .moments import OTHERS, AdapterMoments, OutputMoments, find_directions
from .problem import MemoryEstimate, Objective, Pull, Reduction, RegressionSpec, SiteContext


@dataclass(frozen=True)
class Thresholds:
    """Thresholds, and the choices based on them.

    TᵀX̃ is restricted to output directions, ``reserve`` times the rank plus ``more_directions``, if
    it has more than ``small_target`` entries and this takes ``directions_gain`` times fewer
    operations. Directions are found from ``tokens_a_direction`` tokens each; for images, from those
    of ``sample_rows`` rows per concept. An image row contributes ``least_row_tokens`` tokens, or as
    many as give every concept ``tokens_an_input`` tokens per input of a site.

    With fewer prompts than ``enough_samples`` per LoRA for two LoRAs (proportionally fewer with
    more LoRAs), the ``ridge`` grows with the ``ridge_power`` of the shortfall, up to
    ``most_ridge``, and pulls to the mean at the changes' own size. A change's norm is at most
    ``bound`` times that of the layer's own weight, times the root of the number of LoRAs, and
    ``growth`` times what the LoRAs have there together; both are less below ``bound_samples`` of
    each. ``conditions`` is the share of rows that show other uses. On models of texts ``shrink``
    applies where no concept has ``few_tokens`` tokens per input. Repair of two LoRAs uses
    ``repair_share`` of a feed-forward's hidden units, never more than ``repair_width``.

    Blocks in which rows wait have at most this many barriers (``blocks``: small and large ones). A
    block is replayed if its second run reproduces the first output within ``replay_error``.

    Every step through the denoiser has ``batch`` rows. Its learning rate is ``rate`` times a
    factor's root mean square. ``hints`` is the weight of the blocks' outputs; the final one has 1.
    """

    small_target: int = 1 << 16
    directions_gain: float = 1.5
    reserve: float = 1.25
    more_directions: int = 16
    tokens_a_direction: int = 2
    sample_rows: int = 16
    least_row_tokens: int = 128
    tokens_an_input: int = 32
    ridge: float = 1e-6
    ridge_power: float = 5.0
    most_ridge: float = 1e-2
    bound: float = 0.8
    growth: float = 6.0
    bound_samples: float = 25.0
    conditions: float = 0.25
    enough_samples: int = 50
    shrink: float = 0.7
    few_tokens: float = 4.0
    repair_share: float = 0.5
    repair_width: int = 6144
    blocks: tuple[int, ...] = (3, 8)
    replay_error: float = 1e-3
    batch: int = 16
    rate: float = 0.04
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
            if all(bool(torch.isfinite(rows).all()) for rows in targets):
                directions = find_directions(context.changes, targets, count)
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
