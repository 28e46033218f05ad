"""Restricts a site's change to some output directions, so that TᵀX̃ is computed only in those.

A change uses as many directions as its rank, far fewer than there are outputs. The candidates are
those of the LoRAs' own changes, [up_1 … up_N], and the principal directions of the targets T on a
sample of tokens. :mod:`.output` then does reduced-rank regression (Izenman 1975) within them; on
held-out rows it is as good as with all directions (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.lowrank import leading_eigenvectors
from ..linalg.precision import full_precision
from ..lora import SiteChanges

OTHERS = 8
"""Random extra directions, to estimate what the used ones leave out."""


@dataclass(frozen=True)
class Directions:
    """Orthonormal columns in a site's outputs, (out, k + q): a change may use the first k,
    ``used``; the other q, chosen at random, estimate the energy in the rest of the outputs.
    """

    matrix: Tensor
    used: int
    some = True

    @property
    def count(self) -> int:
        return self.matrix.shape[1]

    @property
    def split(self) -> list[int]:
        """[k, q]"""
        return [self.used, self.count - self.used]

    @property
    def basis(self) -> Tensor:
        """(out, k)"""
        return self.matrix[:, : self.used]

    @property
    def others_stand_for(self) -> float:
        """The number of directions that each of the others represents."""
        out, count = self.matrix.shape
        return (out - self.used) / max(count - self.used, 1)

    def of(self, target: Tensor) -> Tensor:
        """T D for T, (tokens, out)."""
        return target @ self.matrix

    def within(self, up: Tensor) -> Tensor:
        """Dᵀ up for ``up``, (out, rank)."""
        return self.matrix.to(up).mT @ up


class _Every(Directions):
    """All directions: D is the identity, and is not stored."""

    some = False

    @property
    def count(self) -> int:
        return self.used

    def of(self, target: Tensor) -> Tensor:
        return target

    def within(self, up: Tensor) -> Tensor:
        return up


def every_direction(out: int) -> Directions:
    """All directions of a site with ``out`` outputs."""
    return _Every(torch.empty(0), out)


def find_directions(changes: SiteChanges, targets: Sequence[Tensor], count: int) -> Directions:
    """At most ``count`` directions, and a few others to estimate what those leave out.

    ``targets`` are a sample of T for every concept, (tokens, out), on one device, in one dtype.
    Concepts count equally, however many tokens they have. Deterministic up to the order of tokens.
    """
    tokens = torch.cat([rows / max(len(rows), 1) ** 0.5 for rows in targets])
    device = tokens.device
    if device.type == "mps":  # it has no QR
        tokens = tokens.cpu()
    ups = [change.up.to(tokens) for change in changes.own.values()]
    ups = [up for up in ups if bool(up.any())]
    parts: list[Tensor] = []
    with full_precision(tokens.device):
        if ups:
            parts.append(torch.linalg.qr(torch.cat(ups, dim=1)).Q[:, :count])
            tokens = tokens - (tokens @ parts[0]) @ parts[0].mT
        left = count - sum(part.shape[1] for part in parts)
        if left > 0 and len(tokens):
            vectors, values = leading_eigenvectors((tokens @ tokens.mT).double(), left)
            vectors = vectors[:, :left][:, values[:left] > values[0] * 1e-12]
            parts.append(tokens.mT @ vectors.to(tokens))
        used = sum(part.shape[1] for part in parts)
        out = tokens.shape[1]
        generator = torch.Generator().manual_seed(0)
        others = torch.randn(out, min(OTHERS, out - used), generator=generator)
        parts = [part / part.norm(dim=0).clamp(min=1e-30) for part in (*parts, others.to(tokens))]
        return Directions(torch.linalg.qr(torch.cat(parts, dim=1)).Q.to(device), used)
