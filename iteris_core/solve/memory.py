"""How much memory the moments and the solve of sites take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from torch import Tensor

from ..linalg.lowrank import searches
from ..lora import LowRank
from .directions import target_rows

_PIECE = 1 << 21  # of a moment on its way to float64, see :func:`.moments.pieces`


def statistics_bytes(
    references: Mapping[str, Sequence[LowRank | None]],
    sites: Set[str],
    *,
    repairs: Mapping[str, Tensor | None] | None = None,
    cross: bool = False,
    itemsize: int = 4,
    at_once: bool = False,
) -> int:
    """What the moments and the solve of ``sites`` take at most, in bytes.

    In a sweep that is the largest site's: X̃ᵀX̃ (and XᵀX̃ with ``cross``) and the targets for every
    concept, and the solve. ``repairs`` are the sites that are solved in the moments' precision,
    with the inputs that they are solved for (None: all). ``at_once`` keeps the moments of all sites
    (Jacobi).
    """
    largest = moments = 0
    for site in sites:
        changes = references[site]
        out, width = next(c.shape for c in changes if c is not None)
        inputs = (repairs or {}).get(site)
        width = width if inputs is None else len(inputs)
        rank = sum(c.rank for c in changes if c is not None)
        own = len(changes) * width * width * (1 + cross) * itemsize
        if not (cross or at_once):
            out = target_rows(out, width, rank)
        target = 0 if cross else len(changes) * out * width * itemsize
        exact = site not in (repairs or {}) or itemsize == 8
        solve = solve_bytes(out, width, rank, exact=exact, factors=cross)
        moments += own + target
        largest = max(largest, (0 if at_once else own + target) + solve)
    return largest + (moments if at_once else 0)


def changes_bytes(references: Mapping[str, Sequence[LowRank | None]]) -> int:
    """What the merged changes take at most, float32 factors of Σ r_i."""
    total = 0
    for changes in references.values():
        out, width = next(c.shape for c in changes if c is not None)
        total += 4 * (out + width) * sum(c.rank for c in changes if c is not None)
    return total


def solve_bytes(out: int, width: int, rank: int, *, exact: bool, factors: bool) -> int:
    """What :func:`.solve.solve_site` takes beyond the moments, about (rank 8 to 32, two to ten
    LoRAs, widths 128 to 5120): M and what is made of the right side, which is of rank ``rank``
    with ``factors`` (``align="adapter"``). Without ``exact`` it is float32."""
    low = rank * (4 * width + 2 * out)
    if factors:
        return 8 * width * width + min(8 * width * width, _PIECE) + 18 * low + 32 * rank * rank
    search = searches(out, width, rank)
    if exact:
        dense = 12 * width * width + 16 * out * width if search else 8 * width**2 + 48 * out * width
        return dense + 12 * low
    return 4 * width * width + (9 if search else 26) * out * width + 6 * low
