"""What one micro-batch shows at one site, as tokens; and a change's part of a site's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..lora import LowRank
from .saliency import Focus

Group = tuple[str, int]
"""Stands for one tensor: the stage that it belongs to, and a number."""


@dataclass(frozen=True)
class Visit:
    """What one micro-batch shows at one site, before the merged change is added.

    ``inputs`` and ``outputs`` are the site's own tensors, rows first, reference rows before merged
    rows; ``outputs`` has the reference rows' changes in it. ``spans`` lists (concept, start, stop)
    in reference rows; a merged row is ``rows`` further down (``copies=2``) or the reference row
    itself (``copies=1``). ``group`` is the same for sites that received the same tensor, and
    ``alive`` lists the groups that may still come again; ``call`` counts the site's earlier calls
    in this forward. ``mask`` is (rows, tokens), True where a token counts; None where all do.
    ``choice`` picks some, see :class:`TokenChoice`. ``stream`` is the residual stream that the
    output will be added to, shaped as ``outputs``; None where the site has none. ``focus`` weighs
    tokens; None where all count alike. Copy or reduce: the model may change these tensors later.
    """

    site: str
    module: nn.Module
    inputs: Tensor
    outputs: Tensor
    rows: int
    copies: int
    spans: Sequence[tuple[int, int, int]]
    group: Group
    alive: set[Group]
    call: int
    mask: Tensor | None = None
    choice: TokenChoice | None = None
    stream: Tensor | None = None
    focus: Focus | None = None

    def input_tokens(self, start: int, stop: int, *, merged: bool = False) -> Tensor:
        """Inputs of the reference rows ``start`` to ``stop``, or of the merged rows, (tokens, in).

        A convolution is a linear map of its patches; masked tokens are left out.
        """
        return self._tokens(input_tokens, self.inputs, start, stop, merged)

    def output_tokens(self, start: int, stop: int, *, merged: bool = False) -> Tensor:
        """The outputs that belong to :meth:`input_tokens`, (tokens, out)."""
        return self._tokens(output_tokens, self.outputs, start, stop, merged)

    def drift_tokens(self, start: int, stop: int) -> Tensor | None:
        """How far the merged rows' residual stream is behind the reference rows', (tokens, out)."""
        if self.stream is None or self.copies == 1:
            return None
        own = self._tokens(output_tokens, self.stream, start, stop, False)
        return own - self._tokens(output_tokens, self.stream, start, stop, True)

    def count(self, start: int, stop: int) -> int:
        """How many tokens :meth:`input_tokens` has."""
        length = self._length()
        chosen = self._choice(length, start, stop)
        return (stop - start) * length if chosen is None else len(chosen)

    def fewer(self, tokens: int) -> Visit:
        """The same with at most so many of the tokens of every row."""
        assert self.choice is not None
        return replace(self, choice=self.choice.at_most(tokens))

    def own_change(self, change: LowRank, start: int, stop: int) -> Tensor:
        """What ``change`` added to the outputs of reference rows, (tokens, out)."""
        return self._chosen(self._own_change(change, start, stop), start, stop)

    def own_effect(self, change: LowRank, start: int, stop: int) -> Tensor:
        """‖ΔW x‖² of every token of reference rows, (rows, tokens), 0 where it is masked."""
        added = self._own_change(change, start, stop)
        added = added.to(torch.promote_types(added.dtype, torch.float32))
        effect = added.square().sum(1).reshape(stop - start, -1)
        return effect if self.mask is None else effect * self.mask[start:stop]

    def token_weights(self, start: int, stop: int) -> Tensor | None:
        """How much each token of :meth:`input_tokens` counts, (tokens, 1); None: all alike."""
        if self.focus is None:
            return None
        weights = self.focus.weights(self.group, self.alive, self._length())
        if weights is None:
            return None
        return self._chosen(weights[start:stop].reshape(-1, 1), start, stop)

    def _own_change(self, change: LowRank, start: int, stop: int) -> Tensor:
        inputs = self.inputs[start:stop]
        added = delta(self.module, change.to(inputs.dtype, inputs.device), inputs)
        return output_tokens(self.module, added)

    def _tokens(
        self,
        flatten: Callable[[nn.Module, Tensor], Tensor],
        tensor: Tensor,
        start: int,
        stop: int,
        merged: bool,
    ) -> Tensor:
        offset = self.rows if merged and self.copies == 2 else 0
        tokens = flatten(self.module, tensor[offset + start : offset + stop])
        return self._chosen(tokens, start, stop)

    @property
    def _width(self) -> int:
        """Inputs of the site as a linear map."""
        if not isinstance(self.module, nn.Conv2d):
            return self.inputs.shape[-1]
        return self.module.in_channels * math.prod(self.module.kernel_size)

    def _length(self) -> int:
        """Tokens of a row, masked ones too."""
        channels = self.outputs.shape[1 if isinstance(self.module, nn.Conv2d) else -1]
        return self.outputs.numel() // (channels * len(self.outputs))

    def _chosen(self, tokens: Tensor, start: int, stop: int) -> Tensor:
        chosen = self._choice(tokens.shape[0] // (stop - start), start, stop)
        if chosen is None:
            return tokens
        return tokens.index_select(0, chosen.to(tokens.device, non_blocking=True))

    def _choice(self, length: int, start: int, stop: int) -> Tensor | None:
        """Which of the tokens of these rows count; None: all."""
        chosen = None
        if self.choice is not None:
            chosen = self.choice.indices(length, start, stop, width=self._width)
        if self.mask is not None:
            mask = self.mask[start:stop].reshape(-1)
            if chosen is None:
                chosen = mask.nonzero().flatten()
            else:
                chosen = chosen.to(mask.device)
                chosen = chosen[mask[chosen]]
        return chosen


class TokenChoice:
    """At most ``limit(width)`` tokens of every row at a site with that many inputs (None: all).

    ``rows`` are the rows' numbers among all samples: the choice of a row depends on its number,
    ``seed`` and the count of tokens alone, not on the micro-batch; a smaller one is part of a
    larger.
    """

    def __init__(self, rows: Sequence[int], limit: Callable[[int], int] | None, seed: int) -> None:
        self._rows = rows
        self._limit = limit
        self._seed = seed
        self._picks: dict[tuple[int, int], Tensor] = {}

    def indices(self, length: int, start: int, stop: int, *, width: int) -> Tensor | None:
        """Which of the flattened tokens of rows ``start`` to ``stop``; None: all of them."""
        limit = length if self._limit is None else self._limit(width)
        if length <= limit:
            return None
        if (length, limit) not in self._picks:
            picks = [self._pick(row, length, limit) for row in self._rows]
            self._picks[length, limit] = torch.stack(picks)
        offsets = torch.arange(stop - start)[:, None] * length
        return (self._picks[length, limit][start:stop] + offsets).flatten()

    def at_most(self, tokens: int) -> TokenChoice:
        """A part of this choice."""
        limit = self._limit

        def fewer(width: int) -> int:
            return tokens if limit is None else min(tokens, limit(width))

        part = TokenChoice(self._rows, fewer, self._seed)
        part._picks = self._picks  # found once
        return part

    def _pick(self, row: int, length: int, limit: int) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self._seed, row, length)) % 2**63)
        return torch.randperm(length, generator=generator)[:limit].sort().values


def delta(module: nn.Module, change: LowRank, inputs: Tensor) -> Tensor:
    """What ``change`` adds to the output of ``module``, without a bias, shaped as that output."""
    if not isinstance(module, nn.Conv2d):
        return (inputs @ change.down.mT) @ change.up.mT
    kernel = change.kernel or (1, 1)
    down = change.down.reshape(change.rank, -1, *kernel)
    hidden = functional.conv2d(
        inputs, down, None, module.stride, module.padding, module.dilation, module.groups
    )
    return functional.conv2d(hidden, change.up[:, :, None, None])


def add_delta(module: nn.Module, change: LowRank, inputs: Tensor, outputs: Tensor) -> None:
    """Add :func:`delta` to ``outputs`` in place; a linear site's in one pass over them."""
    plain = not isinstance(module, nn.Conv2d) and outputs.is_contiguous()
    if not plain or outputs.dtype != change.up.dtype or torch.is_autocast_enabled():
        outputs += delta(module, change, inputs)
        return
    hidden = inputs.reshape(-1, inputs.shape[-1]) @ change.down.mT
    outputs.view(-1, outputs.shape[-1]).addmm_(hidden, change.up.mT)


def input_tokens(module: nn.Module, inputs: Tensor) -> Tensor:
    """A site's inputs as (tokens, in); a convolution is a linear map of its patches."""
    if not isinstance(module, nn.Conv2d):
        return inputs.reshape(-1, inputs.shape[-1])
    if module.kernel_size == (1, 1) and module.stride == (1, 1) and module.padding == (0, 0):
        return inputs.permute(0, 2, 3, 1).reshape(-1, inputs.shape[1])
    assert not isinstance(module.padding, str)  # refused when the hooks were set
    patches = functional.unfold(
        inputs, module.kernel_size, module.dilation, module.padding, module.stride
    )
    return patches.mT.reshape(-1, patches.shape[1])


def output_tokens(module: nn.Module, outputs: Tensor) -> Tensor:
    """A site's outputs as (tokens, out), in the order of :func:`input_tokens`."""
    if not isinstance(module, nn.Conv2d):
        return outputs.reshape(-1, outputs.shape[-1])
    return outputs.permute(0, 2, 3, 1).reshape(-1, outputs.shape[1])
