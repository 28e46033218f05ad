"""The sites behind a name in a LoRA file: rows of one site, or of several that are fused there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Site, or key of a tensor → shape."""


@dataclass(frozen=True)
class Piece:
    """``rows``, (start, stop) each, of a file's tensor are in this order the rows of ``site`` from
    ``start`` on."""

    site: str
    rows: tuple[tuple[int, int], ...]
    start: int = 0

    @property
    def length(self) -> int:
        """The number of rows."""
        return sum(stop - start for start, stop in self.rows)

    def of_file(self, matrix: Tensor) -> Tensor:
        """The rows that the piece is of a file's ``matrix``, in the site's order."""
        return torch.cat([matrix[start:stop] for start, stop in self.rows])

    def place(self, matrix: Tensor, into: Tensor) -> None:
        """Write the piece's rows of the site's ``matrix`` to their places in a file's tensor."""
        at = self.start
        for start, stop in self.rows:
            into[start:stop] = matrix[at : at + stop - start]
            at += stop - start


Alias = tuple[Piece, ...]
"""All pieces of a file's tensor."""


def whole(site: str, shapes: Shapes) -> Alias:
    """The alias of a module that is one site."""
    return fused([site], shapes)


def fused(sites: Sequence[str], shapes: Shapes) -> Alias:
    """The alias of a module that has the rows of ``sites`` one after the other."""
    pieces: list[Piece] = []
    start = 0
    for site in sites:
        stop = start + shapes[site][0]
        pieces.append(Piece(site, ((start, stop),)))
        start = stop
    return tuple(pieces)


def swapped(site: str, shapes: Shapes) -> Alias:
    """The alias of a module whose two halves of rows (shift and scale) trade places."""
    rows = shapes[site][0]
    return (Piece(site, ((rows // 2, rows), (0, rows // 2))),)


def permuted(site: str, order: Sequence[int], start: int = 0) -> Alias:
    """The alias of a module whose row ``order[i]`` is row ``start + i`` of ``site``."""
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
