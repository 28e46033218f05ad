"""What a pipeline of diffusers is: its class, sites and architecture, and LoRA files for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..architectures import Architecture, architecture_of_sites, architectures
from ..architectures.record import PipelineCalls
from ..architectures.sites import named_sites, weight_shape
from ..errors import IterisError
from ..lora import Lora
from ..lora_files import BaseModel, ReadOptions, base_model, read_lora_file

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def pipeline_sites(pipeline: Any) -> dict[str, nn.Module]:
    """Linear and Conv2d modules of every component of the pipeline that a LoRA may change."""
    sites: dict[str, nn.Module] = {}
    for name in COMPONENTS:
        model = getattr(pipeline, name, None)
        if isinstance(model, nn.Module):
            sites |= named_sites(name, model)
    return sites


def base_of(pipeline: Any, sites: Mapping[str, nn.Module]) -> BaseModel:
    """The base model that a pipeline is. Raises :class:`IterisError` for an unknown one."""
    shapes = {site: weight_shape(module) for site, module in sites.items()}
    kind = architecture_of_sites(shapes)
    if kind is None:
        titles = ", ".join(known.title for known in architectures())
        raise IterisError(
            f"{type(pipeline).__name__} has no unet or transformer that LoRAs can be merged on "
            f"here, or that LoRA files are read for; known are {titles}."
        )
    return base_model(kind, shapes)


def calls_of(pipeline: Any, kind: Architecture) -> PipelineCalls:
    """How a pipeline of that architecture is run.

    Raises :class:`IterisError` where it cannot be: another denoiser, a part that is missing, or a
    denoiser that takes more than latents.
    """
    name, calls = type(pipeline).__name__, kind.pipeline
    denoiser: Any = getattr(pipeline, kind.denoiser, None)
    classes = {ancestor.__name__ for ancestor in type(denoiser).__mro__}
    known = kind.components.get(kind.denoiser)
    if calls is None or known is None or known.name not in classes:
        raise IterisError(
            f"{name} has no unet or transformer that LoRAs can be merged on here; there are hosts "
            f"for pipelines of {_with_pipelines()}."
        )
    for part in (*calls.parts, "scheduler"):
        if getattr(pipeline, part, None) is None:
            raise IterisError(f"{name} has no {part}. Load the whole pipeline.")
    config = denoiser.config
    if config.get("out_channels") not in (None, config.in_channels):
        raise IterisError(
            f"{name} takes more than latents ({config.in_channels} channels in, "
            f"{config.out_channels} out: inpainting or control), which this host has not. Merge on "
            "the base model that it was made from; the LoRA fits both."
        )
    return calls


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
        stored = sites[site].weight
        if not isinstance(stored, Tensor) or tuple(stored.shape) != weight_shape(sites[site]):
            raise IterisError(
                f"{path} is a DoRA, which needs the base model's weight of {site}, but that is "
                "quantised; load the base unquantised to read this file."
            )
        return stored.to(torch.float32)

    return read_lora_file(path, base_of(pipeline, sites), weight, options)


def single_file_pipeline(path: Path) -> Any:
    """The pipeline's class, told by diffusers' own detection from the names and shapes of the
    tensors, of which none is read. Raises :class:`IterisError` for what no host is for."""
    import diffusers
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    with safe_open(path, framework="pt") as file:
        checkpoint = {
            key: torch.empty(file.get_slice(key).get_shape(), device="meta")
            for key in file.keys()  # noqa: SIM118
        }
    model_type = infer_diffusers_model_type(checkpoint)
    for known in architectures():
        if known.pipeline is not None and model_type in known.pipeline.single_files:
            return getattr(diffusers, known.pipeline.pipeline)
    raise IterisError(
        f"{path} is a checkpoint of the kind {model_type!r}, on which nothing can be merged here; "
        f"there are hosts for {_with_pipelines()}."
    )


def _with_pipelines() -> str:
    return ", ".join(known.title for known in architectures() if known.pipeline is not None)
