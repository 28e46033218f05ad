"""Which directions of a site's output a change may take, so that TᵀX̃ is made in those alone.

A change keeps as many directions as its rank, of outputs that are many more. The candidates are
those of the LoRAs' own changes, [up_1 … up_N], and the principal directions of the targets T on a
sample of tokens. Reduced-rank regression (Izenman 1975) within them is what :mod:`.solve` then
does; on held-out rows it is as good as among all directions (AGENTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.lowrank import leading_eigenvectors
from ..linalg.precision import full_precision
from ..lora import LowRank
from .moments import Directions

_SMALL = 1 << 16  # entries of TᵀX̃; up to here all directions cost little
_OTHERS = 8


def directions_of(out: int, width: int, rank: int) -> int | None:
    """How many directions stand for all ``out`` at a site where ``rank`` of them are kept; None
    where all of them hardly cost more."""
    count = rank + rank // 4 + 16
    dear = out * width > _SMALL and 3 * count * (out + width) <= 2 * out * width
    return count if dear else None


def target_rows(out: int, width: int, rank: int) -> int:
    """How many rows TᵀX̃ has."""
    count = directions_of(out, width, rank)
    return out if count is None else min(out, count + _OTHERS)


def find_directions(
    changes: Sequence[LowRank | None], targets: Sequence[Tensor], count: int
) -> Directions:
    """``count`` directions at most, and a few others to tell from what those leave out.

    ``changes`` are the LoRAs' own, ``targets`` a sample of T of every concept, (tokens, out), on
    one device, in one dtype. Concepts count alike, however many tokens they have. Deterministic up
    to the order of tokens.
    """
    tokens = torch.cat([rows / max(len(rows), 1) ** 0.5 for rows in targets])
    device = tokens.device
    if device.type == "mps":  # it knows no QR
        tokens = tokens.cpu()
    own = [change.up.to(tokens) for change in changes if change is not None]
    own = [up for up in own if bool(up.any())]
    found: list[Tensor] = []
    with full_precision(tokens.device):
        if own:
            found.append(torch.linalg.qr(torch.cat(own, dim=1)).Q[:, :count])
            tokens = tokens - (tokens @ found[0]) @ found[0].mT
        left = count - sum(part.shape[1] for part in found)
        if left > 0 and len(tokens):
            vectors, values = leading_eigenvectors((tokens @ tokens.mT).double(), left)
            vectors = vectors[:, :left][:, values[:left] > values[0] * 1e-12]
            found.append(tokens.mT @ vectors.to(tokens))
        used = sum(part.shape[1] for part in found)
        out = tokens.shape[1]
        generator = torch.Generator().manual_seed(0)
        others = torch.randn(out, min(_OTHERS, out - used), generator=generator)
        lengths = [part / part.norm(dim=0).clamp(min=1e-30) for part in (*found, others.to(tokens))]
        return Directions(torch.linalg.qr(torch.cat(lengths, dim=1)).Q.to(device), used)
