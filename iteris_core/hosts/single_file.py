"""Which pipeline of diffusers a single-file checkpoint is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..architectures import architectures
from ..errors import IterisError


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
    titles = ", ".join(known.title for known in architectures() if known.pipeline is not None)
    raise IterisError(
        f"{path} is a checkpoint of the kind {model_type!r}, on which nothing can be merged here; "
        f"there are hosts for {titles}."
    )
