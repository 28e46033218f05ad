"""What a pipeline of diffusers is: its class, sites and architecture, and LoRA files for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..architectures import Architecture, architecture_of_sites, architectures
from ..architectures.sites import named_sites, weight_shape
from ..errors import IterisError
from ..lora import Lora
from ..lora_files import BaseModel, ReadOptions, base_model, read_lora_file

COMPONENTS = (
    *("unet", "transformer", "transformer_2"),
    *("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4"),
)


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
        denoiser = next((n for n in ("unet", "transformer") if getattr(pipeline, n, None)), None)
        if denoiser is None:
            raise IterisError(f"{type(pipeline).__name__} has no unet and no transformer.")
        kind = Architecture("diffusers", type(pipeline).__name__, denoiser=denoiser)
    return base_model(kind, shapes)


def check_parts(pipeline: Any, kind: Architecture) -> None:
    """Raise :class:`IterisError` where a part is missing without which no picture is made."""
    name = type(pipeline).__name__
    for part, value in pipeline.components.items():
        needed = (
            part.startswith(("text_encoder", "tokenizer", "scheduler")) or part == kind.denoiser
        )
        optional = getattr(type(pipeline), "_optional_components", ())
        if needed and value is None and part not in optional:
            raise IterisError(f"{name} has no {part}. Load the whole pipeline.")


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
