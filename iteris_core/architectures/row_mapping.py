"""Maps a name in a LoRA file to rows of one site, or of several sites fused there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Site or tensor key → shape."""


@dataclass(frozen=True)
class Piece:
    """The ``rows`` of a file's tensor, (start, stop) each and in this order, are the rows of
    ``site`` starting at ``start``."""

    site: str
    rows: tuple[tuple[int, int], ...]
    start: int = 0

    @property
    def length(self) -> int:
        """The number of rows."""
        return sum(stop - start for start, stop in self.rows)

    def overlaps(self, other: Piece) -> bool:
        """True if both contain the same row of a site."""
        end = min(self.start + self.length, other.start + other.length)
        return self.site == other.site and max(self.start, other.start) < end

    def of_file(self, matrix: Tensor) -> Tensor:
        """The piece's rows of a file's ``matrix``, in the site's order."""
        return torch.cat([matrix[start:stop] for start, stop in self.rows])

    def place(self, matrix: Tensor, into: Tensor) -> None:
        """Write the piece's rows of the site's ``matrix`` to their positions in a file's tensor."""
        at = self.start
        for start, stop in self.rows:
            into[start:stop] = matrix[at : at + stop - start]
            at += stop - start


Alias = tuple[Piece, ...]
"""All pieces of a file's tensor."""


def whole(site: str, shapes: Shapes) -> Alias:
    """The alias for a module that is one site."""
    return fused([site], shapes)


def fused(sites: Sequence[str], shapes: Shapes) -> Alias:
    """The alias for a module with the rows of ``sites`` concatenated."""
    pieces: list[Piece] = []
    start = 0
    for site in sites:
        stop = start + shapes[site][0]
        pieces.append(Piece(site, ((start, stop),)))
        start = stop
    return tuple(pieces)


def swapped(site: str, shapes: Shapes) -> Alias:
    """The alias for a module whose two halves of rows (shift and scale) are swapped."""
    rows = shapes[site][0]
    return (Piece(site, ((rows // 2, rows), (0, rows // 2))),)


def permuted(site: str, order: Sequence[int], start: int = 0) -> Alias:
    """The alias for a module whose row ``order[i]`` is row ``start + i`` of ``site``."""
    runs: list[tuple[int, int]] = []
    for row in order:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return (Piece(site, tuple(runs), start),)


def file_rows(alias: Alias) -> int:
    """The number of rows of the file's tensor."""
    return max(stop for piece in alias for _, stop in piece.rows)
