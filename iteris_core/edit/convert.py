"""Writes a LoRA with another tool's names, as a plain LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..architectures.record import Alias
from ..errors import OutputError
from ..lora import Lora, concatenate
from ..lora_files import BaseModel, write_loras

Names = Literal["kohya", "diffusers", "comfyui"]
"""``kohya``: sd-scripts' names. ``diffusers``: module names by component. ``comfyui``: ComfyUI's
own module names."""


def convert_lora(
    lora: Lora, path: str | Path, names: Names, *, dtype: str = "float16", overwrite: bool = False
) -> Path:
    """Write ``lora``, which was read for its base, under ``names``; its metadata stay.

    Raises :class:`OutputError` if the base has no such names; otherwise raises like
    :func:`..lora_files.write_lora`.
    """
    if lora.base is None:
        raise OutputError("This LoRA's base is unknown; read it for a base.")
    if names == "comfyui":
        lora = replace(lora, base=replace(lora.base, written=comfyui_names(lora.base)))
    layout = "peft" if names == "diffusers" else "kohya"
    return write_loras({Path(path): lora}, layout=layout, dtype=dtype, overwrite=overwrite)[0]


def comfyui_names(base: BaseModel) -> dict[str, Alias]:
    """ComfyUI's names of the base's modules; raises :class:`OutputError` if they are unknown."""
    original = base.architecture.original_names(base.shapes)
    if not original:
        raise OutputError(
            f"ComfyUI's names for {base.architecture.title} are unknown; ComfyUI also reads "
            "diffusers' names (option layout diffusers)."
        )
    texts = {n: alias for n, alias in base.aliases.items() if n.startswith("text_encoders.")}
    return {f"diffusion_model.{name}": alias for name, alias in original.items()} | texts


def largest_error(one: Lora, other: Lora) -> float:
    """Maximum of ‖ΔW_other − ΔW_one‖ / ‖ΔW_one‖ over sites and vectors; 1 where one is missing."""
    errors = [0.0]
    for site, change in one.sites.items():
        got = other.sites.get(site)
        if got is None:
            errors.append(1.0)
            continue
        gap = concatenate([got, change.scaled(-1.0)]).squared_norm()
        errors.append((max(gap, 0.0) / max(change.squared_norm(), 1e-30)) ** 0.5)
    for name, vector in one.vectors.items():
        got = other.vectors.get(name, torch.zeros(()))
        errors.append(float((got - vector).norm() / vector.norm()))
    return max(errors)
