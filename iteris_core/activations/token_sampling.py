"""Which tokens of a row count, and how much: more where a LoRA acts.

A site has one change for all concepts. When they want different outputs for similar inputs,
something must be given up, preferably background. With a share f, token t of a row has the weight

    w_t = 1 − f + f · e_t,   e_t = mean over sites of ‖ΔW_i x_t‖² / (their mean over the row),

over the sites that LoRA i changes, that write to the residual stream, and that this forward has
passed with the same number of tokens. A row's mean weight is 1. Weights come only from reference
rows, so they are the same in a sweep and in Jacobi iterations.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class TokenSampling:
    """At most ``limit(width)`` tokens of every row at a site with that many inputs (None: all). A
    row's selection depends only on its index in ``rows``, ``seed`` and the number of tokens; a
    smaller selection is a subset of a larger one. ``whole`` is the original number of tokens, if
    the present ones are already a selection. ``gathered`` caches selected tokens of live
    tensors."""

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
            picks: list[Tensor] = []
            for row in self.rows:
                pick = self._first(row, self._whole or length, limit)
                if self._whole is not None:
                    pick = torch.searchsorted(self._first(row, self._whole, length), pick)
                picks.append(pick)
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

    def _first(self, row: int, length: int, limit: int) -> Tensor:
        """``limit`` indices of a row's ``length`` tokens, ascending."""
        digest = hashlib.blake2b(f"{self._seed} {row} {length}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randperm(length, generator=generator)[:limit].sort().values


@dataclass
class Saliency:
    """The running e for one micro-batch's rows, by number of tokens; ``share`` is f."""

    share: float
    _given: dict[tuple[Hashable, int], Tensor | None] = field(default_factory=dict[Any, Any])
    _sums: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    _counts: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def add(self, effect: Tensor, rows: int, start: int) -> None:
        """``effect`` is ‖ΔW_i x_t‖² for rows starting at ``start``, out of ``rows``: (n, tokens), 0
        for tokens that do not count. Zero rows are ignored."""
        length = effect.shape[1]
        if length not in self._sums:
            self._sums[length] = effect.new_zeros(rows, length)
            self._counts[length] = effect.new_zeros(rows, 1)
        mean = effect.mean(1, keepdim=True)
        part = slice(start, start + len(effect))
        self._sums[length][part] += torch.where(mean > 0, effect / mean.clamp(min=1e-30), 0.0)
        self._counts[length][part] += (mean > 0).to(effect)

    def weights(self, tensor: Hashable, alive: Set[Hashable], length: int) -> Tensor | None:
        """(rows, tokens), or None if all count equally; the same for all sites that see equally
        many tokens of the ``tensor`` with this key. ``alive`` are keys that may occur again."""
        key = tensor, length
        if key not in self._given:
            weights, count = None, self._counts.get(length)
            if count is not None:
                mean = self._sums[length] / count.clamp(min=1)
                weights = torch.where(count > 0, 1 - self.share + self.share * mean, 1.0)
            self._given = {k: given for k, given in self._given.items() if k[0] in alive}
            self._given[key] = weights
        return self._given[key]
