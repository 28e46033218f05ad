"""The choice of how a site is solved, and every other threshold by which a merge goes one way or
another.

A :class:`Policy` holds the numbers, with what they were chosen by in docs/decisions.md; a merge
takes :data:`POLICY` unless it is given another. What is no choice of a merge stands where it is
used: digits of an algorithm (:mod:`..linalg`), margins and pieces of memory
(:mod:`..activations.meter`), and which prompts and sizes rows have (:mod:`..hosts.rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import SettingsError
from ..lora import SiteChanges
from .adapter import AdapterMoments
from .directions import OTHERS, Directions, find_directions
from .output import OutputMoments
from .problem import Bytes, Objective, Pull, Reduction, RegressionSpec, SiteContext
from .rows import OutputRows


@dataclass(frozen=True)
class Policy:
    """Thresholds, and the choices that are made by them.

    Rows stand for themselves where that takes ``rows_gain`` times fewer operations than
    moments. TᵀX̃ is made in ``reserve`` times the rank and ``more_directions`` directions of
    the output where it has more than ``small_target`` entries and that takes
    ``directions_gain`` times fewer operations; they are found from ``tokens_a_direction``
    tokens for each, of pictures' from those of ``sample_rows`` rows of a concept. Of a row of a
    picture ``least_row_tokens`` tokens count, or what gives every concept ``tokens_an_input``
    for each of a site's inputs. With fewer prompts than ``enough_samples`` for each of two
    LoRAs, or fewer in proportion for each of more, a fit follows its sample, so that the
    ``ridge`` grows with the ``ridge_power`` of what is missing, up to ``most_ridge``, and pulls
    to the mean at the changes' own size. Two concepts in pictures, which hardly compete, are
    repaired by ``repair_share`` of a feed-forward's hidden units.

    Blocks that rows wait in have at most so many barriers (``blocks``: small ones, such as an
    attention, and large ones, which a transformer repeats); one is replayed where its second run
    gives the first one's output to ``replay_error`` of it, and polished by itself where it does
    so to ``segment_error``. A part that is polished has at most ``segment_share`` of a stage's
    sites, so that gradients never go back through the whole model. ``polish_rows`` rows pass it,
    or ``polish_rows_each`` of each concept where they are many, ``polish_at_once`` at a time and
    in ``polish_bytes`` of host memory at most; ``polish_checked`` batches tell whether it gained,
    and ``polish_tokens`` tokens the moments of its inputs, of which ``polish_floor`` of the mean
    is added to each. The polish of the whole model is checked every ``polish_checked_every``
    steps on ``polish_held_out`` rows, a quarter of all at most.
    """

    rows_gain: float = 3.0
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
    enough_samples: int = 50
    repair_share: float = 0.5
    blocks: tuple[int, ...] = (3, 8)
    replay_error: float = 1e-3
    segment_error: float = 1e-2
    segment_share: float = 0.5
    polish_rows: int = 256
    polish_rows_each: int = 64
    polish_at_once: int = 16
    polish_bytes: int = 4 << 30
    polish_checked: int = 8
    polish_tokens: int = 4096
    polish_floor: float = 1e-3
    polish_checked_every: int = 25
    polish_held_out: int = 64

    def choose(
        self, opening: SiteContext, fit: RegressionSpec, objective: Objective, dtype: torch.dtype
    ) -> Reduction:
        """The reduction of a site; ``dtype`` is that of its moments."""
        if objective == "adapter":
            return AdapterMoments(opening, fit.weighting, dtype)
        if self.takes_rows(opening, fit):
            return OutputRows(opening, dtype)
        directions = self._directions(opening, fit)
        return OutputMoments(opening, fit.weighting, dtype, directions)

    def bytes(
        self,
        changes: SiteChanges,
        fit: RegressionSpec,
        objective: Objective,
        itemsize: int,
        *,
        sweep: bool,
    ) -> Bytes:
        """Bytes that :meth:`choose` takes at most at a site; ``itemsize`` is that of its
        moments."""
        if objective == "adapter":
            return AdapterMoments.bytes(changes, itemsize)
        count = self.directions(*changes.shape, changes.rank) if sweep else None
        rows = None if count is None else min(changes.shape[0], count + OTHERS)
        return OutputMoments.bytes(changes, itemsize, rows, fit.dtype)

    def takes_rows(self, opening: SiteContext, fit: RegressionSpec) -> bool:
        """True if a site is solved from its rows, see :mod:`.rows`."""
        if fit.weighting not in ("tokens", "none") or fit.ridge <= 0 or fit.shrink != 1:
            return False
        if opening.tokens is None or opening.shared or opening.processes > 1:
            return False
        return self.rows_are_fewer(opening.tokens, *opening.changes.shape)

    def rows_are_fewer(self, tokens: int, out: int, width: int) -> bool:
        """True if ``tokens`` rows take so many fewer operations than the (in, in) moments."""
        by_rows = tokens**2 * (width + 2 * out) + 3 * tokens * out**2
        moments = tokens * width * (width // 2 + out) + width**3 // 3 + out * width**2
        return self.rows_gain * by_rows < moments

    def directions(self, out: int, width: int, rank: int) -> int | None:
        """The number of directions that stand for all ``out`` at a site where ``rank`` of them are
        kept; None where all of them hardly cost more."""
        count = int(rank * self.reserve) + self.more_directions
        gains = 2 * self.directions_gain * count * (out + width) <= 2 * out * width
        return count if out * width > self.small_target and gains else None

    def _directions(self, opening: SiteContext, fit: RegressionSpec) -> Directions | None:
        most = fit.rank if isinstance(fit.rank, int) else 0
        rank = max(opening.changes.rank, most)
        count = self.directions(*opening.changes.shape, rank)
        if count is None or opening.sample is None:
            return None
        targets = opening.sample(self.tokens_a_direction * count)
        if not all(bool(torch.isfinite(rows).all()) for rows in targets):
            return None  # the solve says so
        return opening.agree(find_directions(opening.changes, targets, count))

    def row_tokens(self, width: int, rows: int) -> int:
        """The number of tokens of each of a concept's ``rows`` that is enough for ``width``
        inputs."""
        return max(self.least_row_tokens, -(-self.tokens_an_input * width // rows))

    def ridge_for(self, samples: int, timesteps: int, loras: int) -> float:
        """α for so many samples of each of so many LoRAs that run."""
        few = max(1.0, self.enough_samples / self._worth(samples, timesteps, loras))
        return max(self.ridge, min(self.ridge * few**self.ridge_power, self.most_ridge))

    def pull_for(self, samples: int, timesteps: int, loras: int) -> Pull:
        """For so many samples of each of so many LoRAs that run: where they are few the pull
        decides much of a merge, and the mean of unlike changes is too small."""
        few = self._worth(samples, timesteps, loras) < self.enough_samples
        return "size" if few else "mean"

    @staticmethod
    def _worth(samples: int, timesteps: int, loras: int) -> float:
        """Samples of each of two LoRAs at four timesteps: a site is fitted to the rows of all
        LoRAs, and rows of one sample are much alike."""
        return samples * max(loras, 2) / 2 * (timesteps / 4) ** 0.25

    def saliency_for(self, loras: int) -> float:
        """The saliency f: two concepts hardly compete."""
        return max(0.0, 1 - 2 / loras)

    def repair_inputs_for(self, loras: int, pictures: bool) -> float:
        """The share of a feed-forward's hidden units that a repair may use."""
        return self.repair_share if pictures and loras == 2 else 1.0

    def __post_init__(self) -> None:
        if self.ridge < 0 or self.enough_samples < 1 or self.ridge_power < 0 or self.most_ridge < 0:
            raise SettingsError(
                "A policy's ridge, ridge_power and most_ridge must be 0 or more, its "
                "enough_samples 1 or more."
            )


POLICY = Policy()
