"""A model's sites: their names, weight shapes, and which of them add to a residual stream.

A layer is recognised by the names of its parts, which determine its wiring. Layers that match no
entry (norms after a branch, parallel branches, gates, factors) have no streams by name; those of
denoisers are found by what a forward shows (:mod:`..activations.streams`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BaseError

_SIGNS = 256
_SCALES = ("residual_multiplier", "residual_scale")
"""Names of a layer's factor on its additions to the stream (Granite, MiniCPM)."""


def weight_shape(module: Any) -> tuple[int, ...]:
    """(out, in) or (out, in / groups, kh, kw), even of a transposed (Conv1D) or packed weight."""
    if isinstance(module, nn.Conv2d):
        kernel = (module.kernel_size[0], module.kernel_size[1])
        return (module.out_channels, module.in_channels // module.groups, *kernel)
    if hasattr(module, "nf"):
        return (module.nf, module.nx)
    return (module.out_features, module.in_features)


@torch.no_grad()
def weight_energy(module: Any, inputs: Tensor) -> Tensor:
    """‖W‖²_F of ``module``, a float32 scalar on its device, by what it makes of random signs x,
    since E‖Wx‖² = ‖W‖_F²: within some percent, whatever form its weight has (quantised, offloaded,
    with another LoRA on it). The signs get the dtype and device of ``inputs``."""
    _, width, *kernel = weight_shape(module)
    channels, size, edge = width * getattr(module, "groups", 1), (_SIGNS, width), 0
    if kernel:
        edge = max(kernel)
        size = (2, channels, *(8 + 4 * edge * stride for stride in module.stride))
    generator = torch.Generator().manual_seed(width)
    signs = torch.randint(2, size, generator=generator) * 2 - 1
    signs = torch.cat([signs, torch.zeros_like(signs[:1])])  # the last gives the bias alone
    dtype = inputs.dtype if inputs.is_floating_point() else torch.float32
    outputs = module(signs.to(inputs.device, dtype, non_blocking=inputs.is_cuda)).float()
    outputs = outputs[:-1] - outputs[-1:]
    if kernel:  # without the padding
        outputs = outputs[..., edge:-edge, edge:-edge].movedim(1, -1).flatten(0, -2)
    return outputs.square().sum() / len(outputs)


def plain_weight(site: str, module: Any, reader: str = "This") -> Tensor:
    """The weight of ``module``, (out, in) or (out, in / groups, kh, kw), float32, on the CPU, even
    if accelerate's hooks keep it elsewhere. Raises :class:`BaseError`, naming its ``reader``, if it
    is quantised or has no values."""
    context: AbstractContextManager[None] = nullcontext()
    if hasattr(module, "_hf_hook"):
        from accelerate.utils import align_module_device

        context = align_module_device(module, torch.device("cpu"))
    with context:
        weight = module.weight
        plain = isinstance(weight, Tensor) and weight.is_floating_point()
        if plain and hasattr(module, "nf"):
            weight = weight.mT
        need = f"{reader} needs the base's weight of {site}, but it is"
        if not plain or tuple(weight.shape) != weight_shape(module):
            raise BaseError(f"{need} quantised; load the base unquantised.")
        if weight.is_meta:
            raise BaseError(
                f"{need} on the device 'meta' and has no values; load the base without offload."
            )
        return weight.detach().to("cpu", torch.float32)


def named_sites(component: str, model: nn.Module) -> dict[str, nn.Module]:
    """Linear and Conv2d modules of a component, by their names in LoRA files."""
    sites: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        # transformers 5 dropped ``text_model.`` from the names; files have it.
        if component.startswith("text_encoder") and name.startswith("encoder.layers."):
            name = f"text_model.{name}"
        if isinstance(module, nn.Linear | nn.Conv2d):
            sites[f"{component}.{name}"] = module
    return sites


@dataclass(frozen=True)
class Component:
    """A model at the released size: its ``library`` (diffusers or transformers), the ``name`` of
    its class there, and ``sizes``, arguments of the class or of its configuration."""

    library: str
    name: str
    sizes: Mapping[str, Any]

    def make(self) -> nn.Module:
        """A new instance; call it under torch's meta device."""
        kind: Any = getattr(importlib.import_module(self.library), self.name)
        if self.library == "transformers":
            return kind(kind.config_class(**self.sizes))
        return kind(**self.sizes)


@dataclass(frozen=True)
class Wiring:
    """``added`` maps a site to the module whose input is the stream to which the site's output is
    added.

    The layer's children (except dropouts) are those that ``added`` names, and optionally those in
    ``extra``. ``requires`` and ``forbids`` are modules that distinguish layers with equal names;
    ``layer`` is the layer's class name, if only that distinguishes them. Layers that gate or
    modulate what they add (adaptive norms) match no wiring.
    """

    added: Mapping[str, str]
    extra: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    layer: str = ""

    def fits(self, layer: nn.Module, inner: Set[str]) -> bool:
        """True if ``layer``, with modules named ``inner``, has this wiring."""
        names = {n for n, child in layer.named_children() if not isinstance(child, nn.Dropout)}
        parts = {path.partition(".")[0] for pair in self.added.items() for path in pair}
        return (
            not any(hasattr(layer, name) for name in _SCALES)
            and vars(layer).get("norm_type", "layer_norm") == "layer_norm"
            and self.layer in ("", type(layer).__name__)
            and parts - self.extra <= names <= parts | self.extra
            and all(name in inner for name in self.requires)
            and not any(name in inner for name in self.forbids)
        )


def residual_streams(
    model: nn.Module,
    sites: Mapping[str, nn.Module],
    wirings: Iterable[Wiring],
    changed: Set[str] | None = None,
) -> dict[str, nn.Module]:
    """Site in ``sites`` → the module whose input is its residual stream, in the model's order; only
    in parts of the model (encoder, vision model, …) with a ``changed`` site, if given."""
    names = {module: site for site, module in sites.items()}
    wirings = tuple(wirings)
    streams: dict[str, nn.Module] = {}
    for layer in model.modules():
        inner = dict(layer.named_modules())
        for wiring in wirings:
            if not wiring.fits(layer, inner.keys()):
                continue
            for added, reader in wiring.added.items():
                site = names.get(inner.get(added, layer))
                if site is not None and reader in inner:
                    streams[site] = inner[reader]
    if changed is None:
        return streams
    parts = {tuple(site.split(".")[:2]) for site in changed}
    return {site: stream for site, stream in streams.items() if (*site.split("."),)[:2] in parts}


def unet_levels(blocks: Iterable[nn.Module | None]) -> list[int]:
    """Latents per token side in each transformer block of a UNet's ``blocks``, in their order."""
    levels: list[int] = []
    level = 1
    for module in (module for block in blocks if block is not None for module in block.modules()):
        kind = type(module).__name__
        if kind == "BasicTransformerBlock":
            levels.append(level)
        elif kind.startswith("Downsample"):
            level *= 2
        elif kind.startswith("Upsample"):
            level //= 2
    return levels
