"""Factors for writing to a file: bit-exact in half precision where possible."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OutputError
from ..lora import Lora, LowRank


@dataclass(frozen=True)
class Factors:
    """ΔW = ``scale`` · ``up @ down``, as in files: up (out, rank), down (rank, in·kh·kw), and scale
    alpha / rank. ``kernel`` is (kh, kw) for a convolution."""

    up: Tensor
    down: Tensor
    scale: float = 1.0
    kernel: tuple[int, int] | None = None

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    def dense(self) -> Tensor:
        """ΔW, (out, in·kh·kw)."""
        return (self.up @ self.down) * self.scale

    def tensors(self) -> tuple[Tensor, Tensor]:
        """(up, down) in the shapes of a Linear's or Conv2d's weights."""
        up, down = self.up, self.down
        if self.kernel is not None:
            up, down = up[:, :, None, None], down.reshape(self.rank, -1, *self.kernel)
        return up.contiguous(), down.contiguous()


def store_all(
    lora: Lora, dtype: torch.dtype, one_alpha: Container[str], *, even: bool = False
) -> dict[str, Factors]:
    """Every site's factors in ``dtype``, by component: exact with scale 1 if possible for all,
    otherwise with the scales that were folded in (one scale in components of ``one_alpha``),
    otherwise rounded. With ``even``, components of ``one_alpha`` have one alpha each."""
    stored: dict[str, Factors] = {}
    for component in {site.partition(".")[0]: None for site in lora.sites}:
        sites = {s: c for s, c in lora.sites.items() if s.startswith(f"{component}.")}
        scales = {site: lora.scales.get(site, 1.0) for site in sites}
        exact = {site: _exactly(change, 1.0, dtype) for site, change in sites.items()}
        together = component not in one_alpha or len(set(scales.values())) == 1
        if together and not all(exact.values()):
            scaled = {site: _exactly(c, scales[site], dtype) for site, c in sites.items()}
            exact = scaled if all(scaled.values()) else exact
        alpha = max(change.rank for change in sites.values())
        evened = even and component in one_alpha
        if evened and not all(exact.values()) and any(c.rank != alpha for c in sites.values()):
            stored |= {s: _rounded(s, c, dtype, alpha / c.rank) for s, c in sites.items()}
            continue
        own = {site: exact[site] or _rounded(site, c, dtype) for site, c in sites.items()}
        stored |= _even_out(own, alpha) if evened else own
    return stored


def _even_out(modules: Mapping[str, Factors], alpha: int) -> dict[str, Factors]:
    """The same changes with one alpha: scaled by a power of two, or padded with zeros."""
    if all(math.isclose(module.scale * module.rank, alpha) for module in modules.values()):
        return dict(modules)
    even: dict[str, Factors] = {}
    for name, module in modules.items():
        scale, down = module.scale * alpha / module.rank, module.down
        up = (module.up.float() * (module.rank / alpha)).to(module.up.dtype)
        if not torch.equal(up.float() * (alpha / module.rank), module.up.float()):
            missing = alpha - module.rank
            up = torch.nn.functional.pad(module.up, (0, missing))
            down = torch.nn.functional.pad(module.down, (0, 0, 0, missing))
            scale = module.scale
        even[name] = Factors(up, down, scale, module.kernel)
    return even


def _exactly(change: LowRank, scale: float, dtype: torch.dtype) -> Factors | None:
    """The change without ``scale``, if ``dtype`` represents it exactly."""
    up, down = change.up.to("cpu", torch.float32), change.down.to("cpu", torch.float32)
    stored = Factors((up / scale).to(dtype), down.to(dtype), scale, change.kernel)
    exact = torch.equal(stored.up.float() * scale, up)
    return stored if exact and torch.equal(stored.down.float(), down) else None


def _rounded(site: str, change: LowRank, dtype: torch.dtype, scale: float = 1.0) -> Factors:
    """The change without ``scale`` in ``dtype``, with up and down balanced by a power of two."""
    change = change.scaled(1 / scale)
    up, down = change.up.to("cpu", torch.float32), change.down.to("cpu", torch.float32)
    largest = float(up.abs().max()), float(down.abs().max())
    shift = round(math.log2(largest[1] / largest[0]) / 2) if min(largest) > 0 else 0
    stored = Factors(
        torch.ldexp(up, torch.tensor(shift)).to(dtype),
        torch.ldexp(down, torch.tensor(-shift)).to(dtype),
        scale,
        change.kernel,
    )
    if not bool(torch.isfinite(stored.up).all() and torch.isfinite(stored.down).all()):
        raise OutputError(
            f"Site {site}: values are too large for {str(dtype).removeprefix('torch.')}; write "
            "float32 (option dtype float32)."
        )
    return stored
