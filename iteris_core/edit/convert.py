"""A LoRA under the names of another tool, as a plain LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from ..architectures.row_mapping import Alias
from ..errors import OutputError
from ..lora import Lora, concatenate
from ..lora_files import DTYPES, BaseModel, write_loras
from ..lora_files.peft_folder import write_adapter

Names = Literal["kohya", "diffusers", "comfyui", "peft"]
"""``kohya``: sd-scripts' names. ``diffusers``: module names by component. ``comfyui``: the names
that the modules have in ComfyUI. ``peft``: an adapter folder, for the denoiser alone."""


def convert_lora(
    lora: Lora, path: str | Path, names: Names, *, dtype: str = "float16", overwrite: bool = False
) -> Path:
    """Write ``lora``, which was read for its base, under ``names``; its metadata stay.

    Raises :class:`OutputError` where that base has no such names, and for a ``peft`` folder of a
    LoRA that changes text encoders too; what else keeps a file from being written as
    :func:`..lora_files.write_lora` does.
    """
    path = Path(path)
    if lora.base is None:
        raise OutputError("Nothing is known of this LoRA's base; read it for one.")
    if names == "peft":
        return write_adapter(_denoiser_alone(lora, lora.base), path, dtype=DTYPES[dtype])
    if names == "comfyui":
        lora = replace(lora, base=replace(lora.base, written=comfyui_names(lora.base)))
    layout = "peft" if names == "diffusers" else "kohya"
    return write_loras({path: lora}, layout=layout, dtype=dtype, overwrite=overwrite)[0]


def comfyui_names(base: BaseModel) -> dict[str, Alias]:
    """The names of the base's modules in ComfyUI. Raises :class:`OutputError` for a base whose
    modules are not known by their original names."""
    original = base.architecture.original_names(base.shapes)
    if not original:
        raise OutputError(
            f"For a base of {base.architecture.title} the names that ComfyUI has are not known; "
            "ComfyUI reads diffusers' too (--layout diffusers)."
        )
    texts = {n: alias for n, alias in base.aliases.items() if n.startswith("text_encoders.")}
    return {f"diffusion_model.{name}": alias for name, alias in original.items()} | texts


def _denoiser_alone(lora: Lora, base: BaseModel) -> Lora:
    prefix = f"{base.architecture.denoiser}."
    others = sorted(site for site in lora.sites if not site.startswith(prefix))
    if others:
        raise OutputError(
            f"A folder of peft is for one model, and this LoRA changes {len(others)} layers beside "
            f"the denoiser, such as {others[0]}; write --layout diffusers."
        )
    sites = {site.removeprefix(prefix): change for site, change in lora.sites.items()}
    return replace(lora, sites=sites)


def largest_error(one: Lora, other: Lora) -> float:
    """max over sites, biases and normalisations of ‖ΔW_other − ΔW_one‖ / ‖ΔW_one‖; 1 where
    ``other`` lacks one."""
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
