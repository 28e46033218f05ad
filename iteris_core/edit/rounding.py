"""Rounding of weights: to the nearest value, or stochastically, which preserves the mean."""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
_DIGITS = {torch.float16: (10, -14), torch.bfloat16: (7, -126), FP8: (3, -6)}
"""dtype → mantissa bits, and the smallest exponent of a normal number."""


def rounded(weight: Tensor, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """``weight``, float32, rounded to ``dtype``: to the nearest value without a ``generator``;
    stochastically with one, so that the expectation is the weight itself. Values too large for
    ``dtype`` become its largest number."""
    largest = torch.finfo(dtype).max
    if generator is not None and dtype in _DIGITS:
        bits, least = _DIGITS[dtype]
        exponent = torch.frexp(weight).exponent.sub(1).clamp(min=least)
        step = torch.ldexp(torch.ones_like(weight), exponent - bits)
        chance = torch.rand(weight.shape, generator=generator)
        weight = torch.floor(weight / step + chance) * step
    return weight.clamp(-largest, largest).to(dtype)


def scaled_fp8(weight: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn, scale) for a float32 ``weight``; their product approximates it. The scale
    maps its largest entry to the largest number of the type."""
    scale = weight.abs().max().clamp(min=1e-12) / torch.finfo(FP8).max
    return rounded(weight / scale, FP8, generator), scale.reshape(())
