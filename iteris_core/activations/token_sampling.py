"""Selects tokens of a row, if a part of them is enough."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class TokenSampling:
    """At most ``limit(width)`` tokens of every row at a site with that many inputs (None: all).

    ``rows`` are the rows' indices among all samples. A row's selection depends only on its index,
    ``seed`` and the number of tokens, not on the micro-batch; a smaller selection is a subset of a
    larger one. ``whole`` is the original number of tokens, if the present ones are already a
    selection. ``gathered`` caches selected tokens of tensors while they are in use.
    """

    def __init__(
        self,
        rows: Sequence[int],
        limit: Callable[[int], int] | None,
        seed: int,
        whole: int | None = None,
    ) -> None:
        self.rows = rows
        self._limit = limit
        self._seed = seed
        self._whole = whole
        self._picks: dict[tuple[int, int], Tensor] = {}
        self._made: dict[int, TokenSampling] = {}
        self.gathered: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()

    def indices(self, length: int, start: int, stop: int, *, width: int) -> Tensor | None:
        """Selected indices into the flattened tokens of rows ``start`` to ``stop``; None: all."""
        limit = length if self._limit is None else self._limit(width)
        if length <= limit:
            return None
        if (length, limit) not in self._picks:
            picks = [self._pick(row, length, limit) for row in self.rows]
            self._picks[length, limit] = torch.stack(picks)
        offsets = torch.arange(stop - start)[:, None] * length
        return (self._picks[length, limit][start:stop] + offsets).flatten()

    def at_most(self, tokens: int) -> TokenSampling:
        """A subset of this selection."""
        limit = self._limit

        def fewer(width: int) -> int:
            return tokens if limit is None else min(tokens, limit(width))

        part = TokenSampling(self.rows, fewer, self._seed, self._whole)
        part._picks = self._picks  # computed once
        return part

    def made(self, length: int, width: int) -> TokenSampling | None:
        """This selection for tokens already reduced to the selected ones; None: all are
        selected."""
        if self._limit is None or length <= self._limit(width) or self._whole is not None:
            return None
        if length not in self._made:
            self._made[length] = TokenSampling(self.rows, self._limit, self._seed, length)
        return self._made[length]

    def _pick(self, row: int, length: int, limit: int) -> Tensor:
        if self._whole is None:
            return self._first(row, length, limit)
        there = self._first(row, self._whole, length)
        return torch.searchsorted(there, self._first(row, self._whole, limit))

    def _first(self, row: int, length: int, limit: int) -> Tensor:
        digest = hashlib.blake2b(f"{self._seed} {row} {length}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randperm(length, generator=generator)[:limit].sort().values
