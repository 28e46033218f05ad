"""Adds LoRAs to the weights in a checkpoint, whose names stay the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..architectures.record import Alias, text_component, whole
from ..errors import BaseError, OutputError
from ..lora import LowRank
from ..lora_files import BaseModel, read_header
from ..lora_files.tensors import save_atomically

_DENOISER = ("model.diffusion_model.", "diffusion_model.", "")
_TEXTS = (
    *("cond_stage_model.transformer.", "conditioner.embedders.{}.transformer."),
    *("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."),
)
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.{}.model.")
"""Before the names of a part in checkpoints: of the denoiser, of text encoders with transformers'
names, and of those with open_clip's, where {} is their number."""
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)")
_QUANTISED = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")
_OWN = {"out_proj": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}


Places = Mapping[str, Alias]
"""Key of each known tensor → the rows of sites that it contains."""


def places_in(source: Path, base: BaseModel) -> Places:
    """The weights of ``base`` in a checkpoint."""
    shapes, places = read_header(source)[0], dict[str, Alias]()

    def add(prefixes: Sequence[str], name: str, alias: Alias) -> None:
        keys = (f"{prefix}{name}" for prefix in prefixes)
        if key := next((key for key in keys if key in shapes), None):
            places[key] = (*places.get(key, ()), *alias)

    for name, alias in base.architecture.original_names(base.shapes).items():
        add(_DENOISER, f"{name}.weight", alias)
    for site in base.shapes:
        number = text_component(site)
        if number is None:
            continue
        (piece,) = whole(site, base.shapes)
        name = f"{site.partition('.')[2]}.weight"
        add([prefix.format(number) for prefix in _TEXTS], name, (piece,))
        if match := _LAYER.search(site):
            layer, leaf = f"transformer.resblocks.{match[1]}.", match[2]
            open_clip = [f"{prefix.format(number)}{layer}" for prefix in _OPEN_CLIP]
            if leaf in _OWN:
                add(open_clip, f"{_OWN[leaf]}.weight", (piece,))
            elif leaf in ("q_proj", "k_proj", "v_proj"):  # one tensor, in that order
                start = "qkv".index(leaf[0]) * piece.length
                moved = replace(piece, rows=((start, start + piece.length),))
                add(open_clip, "attn.in_proj_weight", (moved,))
    return places


def weight_in(source: Path, places: Places) -> Callable[[str], Tensor]:
    """A function that returns a site's weight, (out, in·kh·kw), float32, from a checkpoint."""
    held = {piece.site: (key, piece) for key, alias in places.items() for piece in alias}

    def weight(site: str) -> Tensor:
        if site not in held:
            raise BaseError(f"The base has no weight of {site}; is the LoRA for another base?")
        key, piece = held[site]
        with safe_open(source, framework="pt") as file:
            return piece.of_file(file.get_tensor(key).float().flatten(1))

    return weight


def bake(
    source: Path,
    target: Path,
    changes: Mapping[str, LowRank],
    places: Places,
    dtype: torch.dtype | None = None,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the checkpoint ``source`` to ``target`` with ``changes``, by site, added in float32 at
    their ``places`` in it. Names, metadata and all other tensors stay, in their own precision
    unless ``dtype`` is another; values too large for it become its largest number.
    ``tick(done, total)`` reports the tensors written.

    Raises :class:`OutputError` for a change that has no place there, and :class:`BaseError` for a
    quantised checkpoint.
    """
    missing = sorted(changes.keys() - {piece.site for alias in places.values() for piece in alias})
    if missing:
        raise OutputError(
            f"{len(missing)} of {len(changes)} layers have no place in this model's file, such as "
            f"{missing[0]}; bake into the base for which the LoRA was made."
        )
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as file:
        metadata, keys = dict(file.metadata() or {}), list(file.keys())
        if scaled := next((key for key in keys if key.endswith(_QUANTISED)), None):
            raise BaseError(
                f"{source} is already quantised (it has {scaled}); bake into the unquantised file."
            )
        for done, key in enumerate(keys, 1):
            tensor = file.get_tensor(key)
            stored = tensor.dtype
            for piece in places.get(key, ()):
                if piece.site in changes:
                    if not stored.is_floating_point:
                        raise BaseError(
                            f"{source}: {key} has dtype {stored}, to which nothing can be added."
                        )
                    delta = tensor.new_zeros(tensor.flatten(1).shape, dtype=torch.float32)
                    piece.place(changes[piece.site].dense().float(), delta)
                    tensor = tensor.float() + delta.reshape(tensor.shape)
            target_dtype = dtype or stored
            if tensor.is_floating_point() and tensor.dtype != target_dtype:
                largest = torch.finfo(target_dtype).max
                tensor = tensor.float().clamp(-largest, largest).to(target_dtype)
            tensors[key] = tensor
            tick(done, len(keys))
    save_atomically(tensors, target, metadata)
    return target
