"""The sites of any pipeline of diffusers, and LoRA files read for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bases import Base, describe_base
from ..errors import IterisError
from ..lora import Lora
from ..lora_files import ReadOptions, read_lora_file
from .diffusers_sites import named_sites

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def pipeline_sites(pipeline: Any) -> dict[str, nn.Module]:
    """Linear and Conv2d modules of every component of the pipeline that a LoRA may change."""
    sites: dict[str, nn.Module] = {}
    for name in COMPONENTS:
        model = getattr(pipeline, name, None)
        if isinstance(model, nn.Module):
            sites |= named_sites(name, model)
    return sites


def base_of(pipeline: Any, sites: Mapping[str, nn.Module]) -> Base:
    """The kind of base model that a pipeline is, with the shapes of its sites."""
    base = describe_base({site: weight_shape(module) for site, module in sites.items()})
    if base is None:
        raise IterisError(
            f"{type(pipeline).__name__} is of no kind that LoRA files are read for (SD 1.x, 2.x, "
            "XL, 3 and FLUX)."
        )
    return base


def weight_shape(module: nn.Module) -> tuple[int, ...]:
    """Shape of the weight in full, also where the stored one is packed (4-bit)."""
    if isinstance(module, nn.Conv2d):
        kernel = (module.kernel_size[0], module.kernel_size[1])
        return (module.out_channels, module.in_channels // module.groups, *kernel)
    assert isinstance(module, nn.Linear)
    return (module.out_features, module.in_features)


def read_lora(
    pipeline: Any,
    sites: Mapping[str, nn.Module],
    path: Path,
    options: ReadOptions | None = None,
) -> Lora:
    """Every layout that :mod:`..lora_files` knows, scale folded in, float32.

    Raises :class:`LoraFileError` naming the file, the key and both shapes where it does not fit.
    """

    def weight(site: str) -> Tensor:
        own = sites[site].weight
        if not isinstance(own, Tensor) or tuple(own.shape) != weight_shape(sites[site]):
            raise IterisError(
                f"{path} is a DoRA, which needs the base model's weight of {site}, but that is "
                "quantised; load the base unquantised to read this file."
            )
        return own.to(torch.float32)

    return read_lora_file(path, base_of(pipeline, sites), weight, options)
