"""How much of its targets a site's change gets wrong, from rank × rank products with the moments.

Precondition: finite moments, ``own`` completed. Everything is float64 but for products with the
moments themselves, which are in their precision. An equivalent from the rows is
``(T - X @ change.dense().mT).norm() / T.norm()``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..linalg.precision import full_precision
from ..lora import LowRank, concatenate
from .moments import InputMoments, SharedInputs, TargetMoments


def residuals_of(
    mean: LowRank,
    solution: LowRank,
    changes: Sequence[LowRank | None],
    inputs: SharedInputs,
    targets: Sequence[TargetMoments],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """‖T_i − X̃_i ΔWᵀ‖ / ‖T_i‖ of every concept with the mean and with the solution, from rank ×
    rank products. Where T_i is zero, relative to what the other concepts' own changes would do
    there."""
    values: tuple[list[float], list[float]] = ([], [])
    sizes = [mean.rank, solution.rank]
    both = concatenate([mean, solution])  # the dear products, by (in, in), are made once for both
    downs = both.down.split(sizes)
    grams = [up.mT @ up for up in both.up.split(sizes, dim=1)]
    for change, part, target in zip(changes, inputs.concepts, targets, strict=True):
        wanted, crossed = _wanted(both, change, part, target)
        energy = wanted
        if energy <= 0:
            energy = sum(output_energy(other, part.own) for other in changes if other is not None)
        weighted = _times(both.down, part.own).split(sizes)
        for rows, down, gram, cross, found in zip(
            weighted, downs, grams, crossed.split(sizes), values, strict=True
        ):
            output = float(((rows @ down.mT) * gram).sum())
            left = max(0.0, wanted - 2 * float(cross.sum()) + output)
            found.append(math.sqrt(left / energy) if energy > 0 else 0.0)
    return tuple(values[0]), tuple(values[1])


def output_energy(change: LowRank, own: Tensor) -> float:
    """‖X̃ ΔWᵀ‖²_F from r × r products."""
    up, down = change.up.double(), change.down.double()
    return float(((_times(down, own) @ down.mT) * (up.mT @ up)).sum())


def _times(left: Tensor, moment: Tensor) -> Tensor:
    """left · moment in the moment's dtype, which is as exact as it is; ``left``'s dtype out."""
    with full_precision(moment.device):
        return (left.to(moment) @ moment).to(left)


def _wanted(
    candidate: LowRank, change: LowRank | None, part: InputMoments, target: TargetMoments
) -> tuple[float, Tensor]:
    """‖T_i‖² and, by components of the candidate, tr(T_iᵀ X̃_i ΔWᵀ)."""
    if target.target is not None:
        # Both candidates lie within the directions.
        crossed = _times(target.within(candidate.up).mT, target.target)
        return float(target.target_energy), (crossed * candidate.down).sum(1)
    if change is None or target.down_gram is None or part.cross is None:
        return 0.0, candidate.down.new_zeros(candidate.rank)
    up = change.up.double()
    crossed = _times(change.down.double(), part.cross) @ candidate.down.mT
    both = ((up.mT @ candidate.up) * crossed).sum(0)
    return float((target.down_gram.to(up) * (up.mT @ up)).sum()), both
