"""Token weights: larger where a LoRA acts.

A site has one change for all concepts. When they want different outputs for similar inputs,
something must be given up, preferably background. With a share f, token t of a row has the weight

    w_t = 1 − f + f · e_t,   e_t = mean over sites of ‖ΔW_i x_t‖² / (their mean over the row),

over the sites that LoRA i changes, that write to the residual stream, and that this forward has
passed with the same number of tokens. A row's mean weight is 1. Weights come only from reference
rows, so they are the same in a sweep and in Jacobi iterations.
"""

from __future__ import annotations

from collections.abc import Hashable, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Saliency:
    """The running e for one micro-batch's rows, by number of tokens; ``share`` is f."""

    share: float
    _given: dict[tuple[Hashable, int], Tensor | None] = field(
        default_factory=dict[tuple[Hashable, int], Tensor | None]
    )
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
            self._given = {k: weights for k, weights in self._given.items() if k[0] in alive}
            self._given[key] = self._now(length)
        return self._given[key]

    def _now(self, length: int) -> Tensor | None:
        if length not in self._sums:
            return None
        count = self._counts[length]
        mean = self._sums[length] / count.clamp(min=1)
        return torch.where(count > 0, 1 - self.share + self.share * mean, 1.0)
