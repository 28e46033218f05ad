"""Reads a LoRA file without any base: its sites are the module names in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..architectures import Architecture
from ..architectures.record import BaseModel, Shapes, whole
from ..errors import LoraFileError
from ..lora import Lora
from .embeddings import split_embeddings
from .read import ReadOptions, read_lora_file
from .tensors import modules_of, read_tensors

_COMPONENTS = {
    **dict.fromkeys(("lora_te", "lora_te1"), "text_encoder"),
    **{"lora_te2": "text_encoder_2", "lora_te3": "text_encoder_3"},
}
"""Kohya's prefixes of text encoders; everything else is the denoiser."""
_RECORD = Architecture("file", "the file", one_alpha=("unet", *_COMPONENTS.values()), network="")


def read_by_own_names(
    path: Path, options: ReadOptions | None = None
) -> tuple[Lora, Literal["kohya", "peft"]]:
    """The LoRA with sites named as in the file, and the file's layout.

    Raises :class:`LoraFileError` for kinds that need the base model's weights or shapes (LoHa,
    LoKr, DoRA), and for anything that a LoRA cannot represent.
    """
    tensors, metadata = read_tensors(path)
    _, tensors, _ = split_embeddings(path, tensors, metadata)
    kohya = any(key.endswith(".lora_down.weight") for key in tensors)
    modules = modules_of(tensors)
    if not modules:
        raise LoraFileError(f"{path} changes no weight; it is not a LoRA file.")
    shapes: dict[str, tuple[int, ...]] = {}
    sites: dict[str, str] = {}
    for name, parts in modules.items():
        component = _COMPONENTS.get("_".join(name.split("_")[:2]), "unet")
        sites[name] = f"{component}.{name}" if kohya else name
        part_shapes = {part: tuple(tensors[key].shape) for part, key in parts.items()}
        shapes[sites[name]] = _shape(path, name, part_shapes)
    names = {name: whole(site, shapes) for name, site in sites.items()}
    base = BaseModel(_RECORD, shapes, names, names if kohya else {})  # of the file's own modules
    return read_lora_file(path, base, options=options), "kohya" if kohya else "peft"


def _shape(path: Path, name: str, parts: Shapes) -> tuple[int, ...]:
    """The shape of the weight that a module with these ``parts`` changes."""
    if {"up", "down"} <= parts.keys() and not parts.keys() & {"magnitude", "output_magnitude"}:
        up, down = parts["up"], parts["down"]
        if len(up) >= 2 and len(down) >= 2:
            return (up[0], down[1], *parts.get("mid", down)[2:])
    elif set(parts) == {"diff"}:
        return parts["diff"]
    raise LoraFileError(
        f"{path}: {name} is of a kind that can only be read with its base model (it has "
        f"{', '.join(sorted(parts))}); give its base (option base)."
    )
