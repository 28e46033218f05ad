"""A site: a layer of the model as a linear map of tokens.

Sites are linear layers (of any quantisation), GPT-2's Conv1D and two-dimensional convolutions, each
a linear map of its patches.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

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


def by_row(values: Tensor, strengths: Tensor | None) -> Tensor:
    """``values``, rows first, times each row's strength (None: 1)."""
    if strengths is None:
        return values
    return values * strengths.reshape(-1, *[1] * (values.ndim - 1))
