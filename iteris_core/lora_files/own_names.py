"""Reads a LoRA file without any base: its sites are the module names in the file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..architectures import Architecture
from ..architectures.row_mapping import Alias, Shapes, whole
from ..errors import LoraFileError
from ..lora import Lora
from .aliases import BaseModel
from .embeddings import split_embeddings
from .parts import split_key
from .read import ReadOptions, read_lora_file
from .tensors import read_header, read_tensors

_COMPONENTS = {
    **{f"lora_{name}_": "text_encoder" for name in ("te", "te1")},
    **{"lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3"},
}
"""Kohya's prefixes of text encoders; everything else is the denoiser."""
_RECORD = Architecture("file", "the file", one_alpha=("unet", *_COMPONENTS.values()))


def read_by_own_names(
    path: Path, options: ReadOptions | None = None
) -> tuple[Lora, Literal["kohya", "peft"]]:
    """The LoRA with sites named as in the file, and the file's layout.

    Raises :class:`LoraFileError` for kinds that need the base model's weights or shapes (LoHa,
    LoKr, DoRA), and for anything that a LoRA cannot represent.
    """
    tensors, metadata = read_tensors(path)
    _, tensors, _ = split_embeddings(path, tensors, metadata)
    base = _base_of(path, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    return read_lora_file(path, base, options=options), "kohya" if base.written else "peft"


def check_by_own_names(path: Path) -> None:
    """Raise :class:`LoraFileError` if :func:`read_by_own_names` would, from the header alone."""
    _base_of(path, read_header(path)[0])


def _base_of(path: Path, shapes_in_file: Shapes) -> BaseModel:
    """A base made from the file's modules, with names to write if they are kohya's."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    kohya = any(key.endswith(".lora_down.weight") for key in shapes_in_file)
    vectors: dict[str, Alias] = {}
    for key, shape in shapes_in_file.items():
        split = split_key(key, ())
        if kohya and len(shape) == 1 and key.endswith((".diff", ".diff_b")):
            vectors[key] = whole(key, shapes_in_file)
        elif split is not None:
            modules.setdefault(split[0], {})[split[1]] = shape
    if not modules:
        raise LoraFileError(f"{path} changes no weight; it is not a LoRA file.")
    shapes = {name: _shape(path, name, parts) for name, parts in modules.items()}
    components = {
        name: next((c for prefix, c in _COMPONENTS.items() if name.startswith(prefix)), "unet")
        for name in modules
    }
    sites = {name: f"{components[name]}.{name}" if kohya else name for name in modules}
    by_site = {sites[name]: shape for name, shape in shapes.items()}
    names = {name: whole(site, by_site) for name, site in sites.items()}
    return BaseModel(_RECORD, by_site, names, names if kohya else {}, vectors)


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
        f"{', '.join(sorted(parts))}); give option base BASE."
    )
