"""Weights in fewer digits: to the nearest, or up and down by chance so that the mean is kept."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_DIGITS = {torch.float16: (10, -14), torch.bfloat16: (7, -126), FP8: (3, -6)}
"""dtype → bits behind the point, and the smallest exponent of a normal number."""


def rounded(weight: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """``weight``, float32, in ``dtype``: to the nearest without a ``generator``; with one up or
    down by chance, so that the expectation is the weight itself. What is too large for ``dtype``
    becomes its largest number."""
    largest = torch.finfo(dtype).max
    if generator is not None and dtype in _DIGITS:
        bits, least = _DIGITS[dtype]
        exponent = torch.frexp(weight).exponent.sub(1).clamp(min=least)
        step = torch.ldexp(torch.ones_like(weight), exponent - bits)
        chance = torch.rand(weight.shape, generator=generator)
        weight = torch.floor(weight / step + chance) * step
    return weight.clamp(-largest, largest).to(dtype)


def scaled_fp8(weight: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn, scale) of a float32 ``weight``; their product is about the weight. The scale
    brings its largest entry to the largest number of the type."""
    scale = weight.abs().max().clamp(min=1e-12) / torch.finfo(FP8).max
    return rounded(weight / scale, FP8, generator), scale.reshape(())
