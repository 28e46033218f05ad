"""Factors as they go into a file: in half precision bit by bit where that is possible."""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import IterisError
from ..lora import Lora, LowRank


@dataclass(frozen=True)
class Stored:
    """Factors as they go into the file, and the scale alpha / rank that goes with them."""

    up: Tensor
    down: Tensor
    scale: float
    kernel: tuple[int, int] | None

    @property
    def rank(self) -> int:
        return self.up.shape[1]


def store_all(lora: Lora, dtype: torch.dtype, one_alpha: Container[str]) -> dict[str, Stored]:
    """Every site's factors in ``dtype``, by component: exact with scale 1 if they all are, else
    with the scales that were folded in (one scale in components of ``one_alpha``), else rounded."""
    stored: dict[str, Stored] = {}
    for component in {site.partition(".")[0]: None for site in lora.sites}:
        sites = [site for site in lora.sites if site.startswith(f"{component}.")]
        scales = {site: lora.scales.get(site, 1.0) for site in sites}
        plain = {site: _exactly(lora.sites[site], 1.0, dtype) for site in sites}
        if any(module is None for module in plain.values()) and (
            component not in one_alpha or len(set(scales.values())) == 1
        ):
            scaled = {site: _exactly(lora.sites[site], scales[site], dtype) for site in sites}
            if all(module is not None for module in scaled.values()):
                plain = scaled
        for site, module in plain.items():
            stored[site] = module or _rounded(site, lora.sites[site], dtype)
    return stored


def _exactly(change: LowRank, scale: float, dtype: torch.dtype) -> Stored | None:
    """The change without ``scale``, if ``dtype`` holds it bit by bit."""
    up, down = change.up.to("cpu", torch.float32), change.down.to("cpu", torch.float32)
    stored = Stored((up / scale).to(dtype), down.to(dtype), scale, change.kernel)
    exact = torch.equal(stored.up.float() * scale, up)
    return stored if exact and torch.equal(stored.down.float(), down) else None


def _rounded(site: str, change: LowRank, dtype: torch.dtype) -> Stored:
    """The change in ``dtype``, up and down brought to one size by a power of two."""
    up, down = change.up.to("cpu", torch.float32), change.down.to("cpu", torch.float32)
    largest = float(up.abs().max()), float(down.abs().max())
    shift = round(math.log2(largest[1] / largest[0]) / 2) if min(largest) > 0 else 0
    stored = Stored(
        torch.ldexp(up, torch.tensor(shift)).to(dtype),
        torch.ldexp(down, torch.tensor(-shift)).to(dtype),
        1.0,
        change.kernel,
    )
    if not bool(torch.isfinite(stored.up).all() and torch.isfinite(stored.down).all()):
        raise IterisError(
            f"Site {site}: values do not fit {dtype}; write bfloat16 or float32 instead."
        )
    return stored


def shaped(module: Stored) -> tuple[Tensor, Tensor]:
    """(up, down) in the shapes of a Linear's or Conv2d's weights."""
    up, down = module.up, module.down
    if module.kernel is not None:
        up = up[:, :, None, None]
        down = down.reshape(module.rank, -1, *module.kernel)
    return up.contiguous(), down.contiguous()
