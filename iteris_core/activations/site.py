"""A site: a layer of the model as a linear map of tokens, and what a row's condition adds to it.

Sites are linear layers (of any quantisation), GPT-2's Conv1D and two-dimensional convolutions, each
a linear map of its patches.

A row's condition stands for a use of the file: at another strength, beside another LoRA. In a row
of strength s, LoRA i's change is s ΔW_i and the merged one s ΔW, so the fit has s X̃ as its input.
Another LoRA, the phantom, is on in both copies of a row and belongs to the base there. It is made
from one of the merged LoRAs: its inputs, with random signs of its outputs, so that its effect has a
LoRA's size and no meaning.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architectures.sites import weight_shape
from ..errors import SiteError
from ..lora import LowRank


class Site:
    """A linear layer, or a base for others. ``weight_shape`` is the shape of the whole weight, see
    :func:`..architectures.sites.weight_shape`. ``geometry`` describes how tokens are extracted from
    an input: sites with the same tensor and geometry have the same tokens."""

    geometry: Hashable = "linear"
    kernel: tuple[int, int] | None = None

    def __init__(self, weight_shape: tuple[int, ...]) -> None:
        self.weight_shape = weight_shape

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) as a linear map of tokens."""
        out, *rest = self.weight_shape
        return out, math.prod(rest)

    def tokens(self, inputs: Tensor) -> Tensor:
        """Inputs as (tokens, in)."""
        return inputs.reshape(-1, inputs.shape[-1])

    def outputs(self, outputs: Tensor) -> Tensor:
        """Outputs as (tokens, out), in the order of :meth:`tokens`."""
        return outputs.reshape(-1, outputs.shape[-1])

    def length(self, outputs: Tensor) -> int:
        """Tokens per row of ``outputs``."""
        return outputs.numel() // (outputs.shape[-1] * len(outputs))

    def delta(self, change: LowRank, inputs: Tensor) -> Tensor:
        """The output of ``change`` without a bias, shaped as the site's output."""
        return (inputs @ change.down.mT) @ change.up.mT

    def add(
        self, change: LowRank, inputs: Tensor, outputs: Tensor, strengths: Tensor | None = None
    ) -> None:
        """Add :meth:`delta` to ``outputs`` in place, in each row at its strength (None: 1)."""
        plain = outputs.is_contiguous() and outputs.dtype == change.up.dtype
        plain = plain and strengths is None and self.kernel is None
        if not plain or torch.is_autocast_enabled(outputs.device.type):
            outputs += by_row(self.delta(change, inputs), strengths)
            return
        # In one pass over the outputs
        hidden = inputs.reshape(-1, inputs.shape[-1]) @ change.down.mT
        outputs.view(-1, outputs.shape[-1]).addmm_(hidden, change.up.mT)

    def zero(self, rank: int) -> LowRank:
        """A zero change, float32."""
        out, width = self.shape
        return LowRank(torch.zeros(out, rank), torch.zeros(rank, width), self.kernel)


class ConvSite(Site):
    def __init__(self, weight_shape: tuple[int, ...], module: nn.Conv2d) -> None:
        super().__init__(weight_shape)
        self.kernel = (weight_shape[2], weight_shape[3])
        self._padding: Any = module.padding
        self._stride, self._dilation = module.stride, module.dilation
        self.geometry = (self.kernel, self._stride, self._padding, self._dilation)

    def tokens(self, inputs: Tensor) -> Tensor:
        if self.geometry == ((1, 1), (1, 1), (0, 0), (1, 1)):
            return inputs.permute(0, 2, 3, 1).reshape(-1, inputs.shape[1])
        kernel = self.weight_shape[2:]
        patches = functional.unfold(inputs, kernel, self._dilation, self._padding, self._stride)
        return patches.mT.reshape(-1, patches.shape[1])

    def outputs(self, outputs: Tensor) -> Tensor:
        return outputs.permute(0, 2, 3, 1).reshape(-1, outputs.shape[1])

    def length(self, outputs: Tensor) -> int:
        return outputs.numel() // (outputs.shape[1] * len(outputs))

    def delta(self, change: LowRank, inputs: Tensor) -> Tensor:
        down = change.down.reshape(change.rank, -1, *self.weight_shape[2:])
        hidden = functional.conv2d(inputs, down, None, self._stride, self._padding, self._dilation)
        return functional.conv2d(hidden, change.up[:, :, None, None])


def site_of(name: str, module: nn.Module) -> Site:
    """The site for ``module``. Raises :class:`IterisError`, naming it, if it is not supported."""
    try:
        shape = weight_shape(module)
    except AttributeError as error:
        raise SiteError(
            f"Site {name} is a {type(module).__name__}, which is neither a linear layer nor a "
            "convolution; remove it from the LoRA."
        ) from error
    if not isinstance(module, nn.Conv2d):
        return Site(shape)
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise SiteError(
            f"Site {name} is a grouped or specially padded convolution, which cannot be merged; "
            "remove it from the LoRA."
        )
    return ConvSite(shape, module)


@dataclass(frozen=True)
class Condition:
    """The ``strength`` of a row's LoRA and of the merged one. The phantom is made from the LoRA of
    the concept ``phantom`` (None: there is none), at ``beside`` times its strength, by ``seed``."""

    strength: float = 1.0
    phantom: int | None = None
    beside: float = 0.0
    seed: int = 0


PLAIN = Condition()


def under_conditions(
    name: str,
    site: Site,
    conditions: Sequence[Condition],
    inputs: Tensor,
    outputs: Tensor,
    changes: Mapping[int, LowRank | None],
) -> Tensor | None:
    """Add the rows' phantoms to ``outputs`` in place; returns the rows' strengths, (rows,), or None
    if all are 1. ``inputs`` and ``outputs`` are the tensors of ``site`` called ``name``, rows
    first, every row as often as there are copies; ``changes`` those of the phantoms' concepts, in
    the inputs' dtype."""
    rows = len(conditions)
    others = [row for row, of in enumerate(conditions) if of.phantom is not None]
    signs = torch.empty(len(others), site.shape[0])
    for index, row in enumerate(others):
        signs[index] = _signs(name, conditions[row].seed, site.shape[0])
    signs = signs.to(inputs, non_blocking=inputs.is_cuda)  # of all rows at once
    for index, row in enumerate(others):
        of = conditions[row]
        change = changes[of.phantom] if of.phantom is not None else None
        if change is not None:
            phantom = replace(change, up=change.up * (signs[index] * of.beside)[:, None])
            outputs[row::rows] += site.delta(phantom, inputs[row::rows])
    if all(of.strength == 1 for of in conditions):
        return None
    strengths = torch.tensor([of.strength for of in conditions])
    return strengths.to(inputs, non_blocking=inputs.is_cuda).repeat(len(inputs) // rows)


def phantom_of(changes: Mapping[str, LowRank], strength: float, seed: int) -> dict[str, LowRank]:
    """Site → a phantom's change, made from a LoRA's ``changes`` at ``strength``."""
    signs = {name: _signs(name, seed, len(change.up)) for name, change in changes.items()}
    return {
        name: replace(change, up=change.up * (signs[name] * strength).to(change.up)[:, None])
        for name, change in changes.items()
    }


def _signs(name: str, seed: int, count: int) -> Tensor:
    """A sign for every output of the site ``name``, (count,), 1 or -1."""
    draw = torch.Generator().manual_seed(crc32(name.encode(), seed))
    return 2 * torch.empty(count).bernoulli_(0.5, generator=draw) - 1


def by_row(values: Tensor, strengths: Tensor | None) -> Tensor:
    """``values``, rows first, times each row's strength (None: 1)."""
    if strengths is None:
        return values
    return values * strengths.reshape(-1, *[1] * (values.ndim - 1))
