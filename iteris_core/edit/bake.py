"""Adds LoRAs to the weights in a model's files, whose names stay the same."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ..architectures import Architecture, architecture_of_sites
from ..architectures.record import Alias, Shapes, whole
from ..errors import BaseError, OutputError
from ..lora import LowRank
from ..lora_files import BaseModel, base_model, read_header
from ..lora_files.tensors import save_tensors
from ..saving import atomically

FP8 = torch.float8_e4m3fn
_DENOISER = ("model.diffusion_model.", "diffusion_model.", "")
_TEXTS = (
    *("cond_stage_model.transformer.", "conditioner.embedders.{}.transformer."),
    *("text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer."),
)
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.{}.model.")
"""Before the names of a part in single files: of the denoiser, of text encoders with transformers'
names, and of those with open_clip's, where {} is their number."""
_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(self_attn|mlp)\.(\w+)")
_QUANTISED = (".scale_weight", ".weight_scale", ".comfy_quant", "scaled_fp8")
_OWN = {"out_proj": "attn.out_proj", "fc1": "mlp.c_fc", "fc2": "mlp.c_proj"}


Places = Mapping[tuple[Path, str], Alias]
"""File and key of each known tensor → the rows of sites that it contains."""


def places_in(source: Path, base: BaseModel | None) -> tuple[Places, BaseModel]:
    """The weights of a single file for ``base``, or of a diffusers folder, whose names identify its
    base."""
    if source.is_dir() or base is None:
        return _in_folder(source)
    shapes, found = read_header(source)[0], dict[str, Alias]()
    for name, alias in base.architecture.original_names(base.shapes).items():
        _add(found, shapes, [f"{prefix}{name}.weight" for prefix in _DENOISER], alias)
    for site in base.shapes:
        component, _, path = site.partition(".")
        if component.startswith("text_encoder"):
            number = int(component.rpartition("_")[2]) - 1 if component[-1].isdigit() else 0
            keys = [f"{prefix.format(number)}{path}.weight" for prefix in _TEXTS]
            _add(found, shapes, keys, whole(site, base.shapes))
            for prefix in _OPEN_CLIP:
                _add_open_clip(found, shapes, prefix.format(number), site, base.shapes)
    return {(source, key): alias for key, alias in found.items()}, base


def _in_folder(folder: Path) -> tuple[Places, BaseModel]:
    sites: dict[tuple[Path, str], str] = {}  # a model may be there twice, in full and in half
    shapes: dict[str, tuple[int, ...]] = {}
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not part.name.startswith(("unet", "transformer", "text_encoder")):
            continue
        for file in sorted(part.glob("*.safetensors")):
            for key, shape in read_header(file)[0].items():
                name = key.removesuffix(".weight")
                if name != key and len(shape) in (2, 4):
                    if part.name.startswith("text") and name.startswith("encoder.layers."):
                        name = f"text_model.{name}"
                    sites[file, key] = f"{part.name}.{name}"
                    shapes[f"{part.name}.{name}"] = shape
    denoiser = next((name for name in ("unet", "transformer") if (folder / name).is_dir()), "unet")
    kind = architecture_of_sites(shapes) or Architecture("folder", "diffusers", denoiser=denoiser)
    return {at: whole(site, shapes) for at, site in sites.items()}, base_model(kind, shapes)


def _add(found: dict[str, Alias], shapes: Shapes, keys: list[str], alias: Alias) -> None:
    key = next((key for key in keys if key in shapes), None)
    if key is not None:
        found[key] = (*found.get(key, ()), *alias)


def _add_open_clip(
    found: dict[str, Alias], shapes: Shapes, prefix: str, site: str, sites: Shapes
) -> None:
    """There, q, k and v are one tensor, in that order."""
    match = _LAYER.search(site)
    if match is None:
        return
    layer, leaf = f"{prefix}transformer.resblocks.{match[1]}.", match[3]
    (piece,) = whole(site, sites)
    if leaf in _OWN:
        _add(found, shapes, [f"{layer}{_OWN[leaf]}.weight"], (piece,))
    elif leaf in ("q_proj", "k_proj", "v_proj"):
        start = "qkv".index(leaf[0]) * piece.length
        moved = type(piece)(site, ((start, start + piece.length),))
        _add(found, shapes, [f"{layer}attn.in_proj_weight"], (moved,))


def weight_in(places: Places) -> Callable[[str], Tensor]:
    """A function that returns a site's weight, (out, in·kh·kw), float32, from files."""
    held = {piece.site: (at, piece) for at, alias in places.items() for piece in alias}

    def weight(site: str) -> Tensor:
        if site not in held:
            raise BaseError(f"The base has no weight of {site}; is the LoRA for another base?")
        (path, key), piece = held[site]
        with safe_open(path, framework="pt") as file:
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
    """Write ``source`` to ``target`` with ``changes`` added in float32. Names, metadata and all
    other tensors and files stay, in their own precision unless ``dtype`` is another. With
    :data:`FP8`, the denoiser's linear layers get one scale each and everything else is float16.

    Raises :class:`OutputError` for a change that has no place there.
    """
    missing = sorted(changes.keys() - {piece.site for alias in places.values() for piece in alias})
    if missing:
        raise OutputError(
            f"{len(missing)} of {len(changes)} layers have no place in this model's files, such as "
            f"{missing[0]}; bake into the base for which the LoRA was made."
        )
    with atomically(target) as unfinished:
        if source.is_dir():
            baked = {file for file, _ in places}
            shutil.copytree(
                source,
                unfinished,
                ignore=lambda folder, names: {n for n in names if Path(folder, n) in baked},
            )
        for file in dict.fromkeys(file for file, _ in places):
            own = {key: alias for (other, key), alias in places.items() if other == file}
            tensors, metadata = _baked(file, changes, own, dtype, tick)
            save_tensors(tensors, unfinished / file.relative_to(source), metadata)
    return target


def _baked(
    source: Path,
    changes: Mapping[str, LowRank],
    places: Mapping[str, Alias],
    dtype: torch.dtype | None,
    tick: Callable[[int, int], None],
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of one file with ``changes``."""
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as file:
        metadata, keys = dict(file.metadata() or {}), list(file.keys())
        if scaled := next((key for key in keys if key.endswith(_QUANTISED)), None):
            raise BaseError(
                f"{source} is already quantised (it has {scaled}); bake into the unquantised file, "
                "with option dtype fp8."
            )
        for done, key in enumerate(keys, 1):
            tensor, pieces = file.get_tensor(key), places.get(key, ())
            own = tensor.dtype
            for piece in pieces:
                if piece.site in changes:
                    if not own.is_floating_point:
                        raise BaseError(
                            f"{source}: {key} has dtype {own}, to which nothing can be added."
                        )
                    delta = tensor.new_zeros(tensor.flatten(1).shape, dtype=torch.float32)
                    piece.place(changes[piece.site].dense().float(), delta)
                    tensor = tensor.float() + delta.reshape(tensor.shape)
            linear = any(not piece.site.startswith("text_encoder") for piece in pieces)
            tensors |= _stored(key, tensor, own, dtype, linear)
            tick(done, len(keys))
    if any(key.endswith(".scale_weight") for key in tensors):
        # These two entries make ComfyUI multiply in full precision on every card.
        prefix = next(p for p in _DENOISER if any(key.startswith(p) for key in tensors))
        tensors[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=FP8)
    return tensors, metadata


def _stored(
    key: str, tensor: Tensor, own: torch.dtype, wanted: torch.dtype | None, linear: bool
) -> dict[str, Tensor]:
    """``tensor`` in the dtype that is ``wanted``, or in its ``own``; ``linear`` marks weights of
    the denoiser's layers, which get a scale with float8."""
    if not tensor.is_floating_point():
        return {key: tensor}
    dtype = wanted or own
    if dtype == FP8 and linear and tensor.ndim == 2:
        exact = tensor, torch.ones(())  # what nothing changed keeps its bytes
        stored, scale = exact if tensor.dtype == FP8 else scaled_fp8(tensor.float())
        return {key: stored, f"{key.removesuffix('.weight')}.scale_weight": scale}
    if dtype == FP8 and (wanted is not None or tensor.dtype != FP8):
        dtype = torch.float16
    if dtype == tensor.dtype:
        return {key: tensor}
    return {key: rounded(tensor.float(), dtype)}


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 ``weight`` in ``dtype``; values too large become its largest number."""
    largest = torch.finfo(dtype).max
    return weight.clamp(-largest, largest).to(dtype)


def scaled_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(float8_e4m3fn, scale) of a float32 weight, whose largest entry becomes the type's."""
    scale = weight.abs().max().clamp(min=1e-12) / torch.finfo(FP8).max
    return rounded(weight / scale, FP8), scale.reshape(())
