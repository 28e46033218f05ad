"""How much of its targets a site's change gets wrong, from rank × rank products with the moments.

Precondition: finite moments, ``own`` completed. Everything is float64 but for products with the
moments themselves, which are in their precision. An equivalent from the rows is
``(T - X @ change.dense().mT).norm() / T.norm()``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from ..linalg.precision import full_precision
from ..lora import LowRank, SiteChanges, concatenate
from .inputs import InputMoments

Wanted = Callable[[int, LowRank], tuple[float, Tensor]]
"""``wanted(concept, candidate)``: ‖T_i‖² and, by components of the candidate, tr(T_iᵀ X̃_i ΔWᵀ)."""


def residuals_of(
    mean: LowRank, solution: LowRank, changes: SiteChanges, inputs: InputMoments, wanted: Wanted
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """‖T_i − X̃_i ΔWᵀ‖ / ‖T_i‖ of every concept, with the mean and with the solution.

    Where T_i is zero, relative to what the other concepts' own changes would do there.
    """
    before: list[float] = []
    after: list[float] = []
    sizes = [mean.rank, solution.rank]
    both = concatenate([mean, solution])  # the dear products, by (in, in), are made once for both
    downs = both.down.split(sizes)
    grams = [up.mT @ up for up in both.up.split(sizes, dim=1)]
    for concept, own in enumerate(inputs.own):
        target, crossed = wanted(concept, both)
        scale = target
        if scale <= 0:
            scale = sum(output_energy(change, own) for change in changes.own.values())
        weighted = times(both.down, own).split(sizes)
        for rows, down, gram, cross, errors in zip(
            weighted, downs, grams, crossed.split(sizes), (before, after), strict=True
        ):
            output = float(((rows @ down.mT) * gram).sum())
            left = max(0.0, target - 2 * float(cross.sum()) + output)
            errors.append(math.sqrt(left / scale) if scale > 0 else 0.0)
    return tuple(before), tuple(after)


def output_energy(change: LowRank, own: Tensor) -> float:
    """‖X̃ ΔWᵀ‖²_F from r × r products; ``own`` is X̃ᵀX̃, (in, in)."""
    up, down = change.up.double(), change.down.double()
    return float(((times(down, own) @ down.mT) * (up.mT @ up)).sum())


def times(left: Tensor, moment: Tensor) -> Tensor:
    """left · moment in the moment's dtype, which is as exact as it is; ``left``'s dtype out."""
    with full_precision(moment.device):
        return (left.to(moment) @ moment).to(left)
