"""Sites of a MODEL and CLIP, and LoRA files for them, with ComfyUI's key maps as aliases."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor, nn

from ..iteris_core.architectures import Architecture, architecture_of_sites
from ..iteris_core.architectures.record import Alias, Shapes, permuted, whole
from ..iteris_core.architectures.sites import weight_shape
from ..iteris_core.errors import BaseError, IterisError, LoraFileError
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import BaseModel, ReadOptions, read_lora_file
from ..iteris_core.lora_files.aliases import kohya_names
from ..iteris_core.lora_files.embeddings import file_names, unbundled
from ..iteris_core.lora_files.tensors import split_key
from .comfy_internals import comfy, memory
from .comfy_learned import with_embeddings

_TEXT = re.compile(r"(lora|lycoris)_te|text_encoder|te\d?[._]|clip_[lgh]\.|t5xxl|text_model|cond_")
"""Prefix of text encoders' names in LoRA files."""
_NO_SITE = "not the weight of a linear layer or 2D convolution; only these can be merged"


class ComfySites:
    """The weights of a MODEL and CLIP that a LoRA can change.

    ``key_map`` is ComfyUI's (name in a LoRA file → weight key, and slice of it), extended by
    missing names. ``names`` maps weight keys to sites, ``modules`` sites to modules. ``base`` holds
    the key map as aliases of sites, and one name per site that the stock loader accepts.
    """

    def __init__(self, model: Any, clip: Any) -> None:
        kinds = {f"{type(m).__module__}.{type(m).__name__}" for m in model.model.modules()}
        if any("nunchaku" in kind.lower() for kind in kinds):
            raise BaseError(
                "MODEL is a Nunchaku model with fused layers, whose inputs cannot be observed. "
                "Merge on the model from which it was made, for instance in fp8 or GGUF."
            )
        self._model, self._clip = model, clip
        stock = _stock_key_map(model, clip)
        self.key_map = with_missing_names(stock)
        our_name = our_names(model, clip)
        self.names: dict[str, str] = {}
        self.modules: dict[str, nn.Module] = {}
        for key in sorted(set(map(_weight_key, self.key_map.values()))):
            try:
                module = self._root(key).get_submodule(key.rpartition(".")[0])
            except AttributeError:  # this model lacks it
                continue
            # Quantised layers are not nn.Linear, but expose their width.
            linear = isinstance(module, nn.Conv2d) or hasattr(module, "in_features")
            linear &= not hasattr(module, "num_experts")  # MoEExperts: one tensor for all of them
            if linear and key.endswith(".weight"):
                site = self.names[key] = our_name(key).removesuffix(".weight")
                self.modules[site] = module
        self._keys = {site: key for key, site in self.names.items()}
        shapes = {site: weight_shape(module) for site, module in self.modules.items()}
        aliases: dict[str, Alias] = {}
        self._refused: dict[str, str] = {}
        there = set(model.model.state_dict())
        there |= set() if clip is None else set(clip.cond_stage_model.state_dict())
        for name, target in self.key_map.items():
            if (site := self.names.get(_weight_key(target))) is None:
                if (key := _weight_key(target)) in there:
                    self._refused[name] = f"{key}, {_NO_SITE}"
                continue
            alias = alias_of(site, shapes, target)
            if isinstance(alias, str):
                self._refused[name] = alias
            else:
                aliases[name] = alias
        # A UNet's sites have diffusers' names; other denoisers have just the class name.
        unet = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        known = architecture_of_sites(shapes) if unet else None
        kind = known or Architecture("comfyui", type(model.model).__name__, denoiser="unet")
        written = names_to_write(kind, shapes, {n: a for n, a in aliases.items() if n in stock})
        self.base = BaseModel(kind, shapes, aliases, written)

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        """Read any file that ComfyUI reads, and diffusers files that it reads only in part.

        Anything that would be left out is an error; with ``allow_partial`` it is a note.
        """
        path, options = Path(path), options or ReadOptions()

        def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            of_text = [key for key in tensors if _TEXT.match(key)]
            if not options.text:
                tensors = {key: t for key, t in tensors.items() if not _TEXT.match(key)}
            elif of_text and self._clip is None and not options.allow_partial:
                raise LoraFileError(
                    f"{path.name} changes the text encoder ({of_text[0]}), and no CLIP is "
                    "connected; connect one, or set the LoRA's strength there to 0."
                )
            # BFL's, Wan-Fun's and USO's keys, and those of later versions.
            converted = comfy.lora_convert.convert_lora(tensors)
            if self._holds(converted):
                raise LoraFileError(
                    f"{path.name} is on this MODEL or CLIP already, as Load LoRA puts it there, "
                    "and would count twice. Connect MODEL and CLIP from before that node, or "
                    "choose To IterIS LoRAs in its menu."
                )
            for key in converted if not options.allow_partial else ():
                name = (split_key(key, self._refused) or ("", ""))[0]
                if name in self._refused:
                    raise LoraFileError(f"{path}: {key} changes {self._refused[name]}.")
            return converted

        lora = read_lora_file(path, self.base, self.weight, options, convert)
        return replace(lora, source=listed_name(path))

    def _holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """True if a patch of MODEL or CLIP has factors that are among a LoRA's ``tensors``."""
        patchers = [self._model, *([] if self._clip is None else [self._clip.patcher])]
        every = (
            patch for patcher in patchers for some in patcher.patches.values() for patch in some
        )
        parts = (part for patch in every for part in getattr(patch[1], "weights", ()))
        there = {_sketch(part) for part in parts if isinstance(part, Tensor)} - {None}
        return bool(there) and not there.isdisjoint(map(_sketch, tensors.values()))

    def _root(self, key: str) -> nn.Module:
        root: nn.Module = self._model.model if in_denoiser(key) else self._clip.cond_stage_model
        return root

    def weight(self, site: str) -> Tensor:
        """The base's weight in float32, including LoRAs already applied. An unused projection is
        zero, because ComfyUI leaves its memory uninitialised."""
        key = self._keys[site]
        encoder = getattr(self._root(key), key.partition(".")[0], None)
        unused = key.endswith(".text_projection.weight") and not encoder.return_projected_pooled
        return torch.zeros(self.base.shapes[site]) if unused else self._value(key, site)

    def _value(self, key: str, site: str) -> Tensor:
        patcher = self._model if in_denoiser(key) else self._clip.patcher
        (weight, convert), *patches = patcher.get_key_patches(key)[key]
        if not weight.is_floating_point():
            made = getattr(self.modules[site], "get_weight", None)  # as in ComfyUI-GGUF's layers
            if made is None:
                raise BaseError(
                    f"A DoRA, or an extraction, needs the base's weight of {site}, "
                    "but this base stores it as quantised GGUF bytes, which cannot be read; load "
                    "the base from a safetensors file."
                )
            whole: Tensor = made(weight, torch.float32)
            if getattr(weight, "patches", None):  # which are then included
                return whole.detach()
            weight = whole
        weight = memory.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, convert(weight, inplace=True), key).detach()


def _sketch(factor: Tensor) -> tuple[object, ...] | None:
    """Its shape and a few of its numbers; None for a scalar and for zeros, which are in many."""
    some = factor.flatten()[:: max(1, factor.numel() // 8)].tolist()
    return (factor.shape, *some) if factor.ndim > 1 and any(some) else None


def listed_name(path: Path) -> str:
    """The name of a LoRA file as Load LoRA lists it, or its name without folders."""
    folders = [Path(folder) for folder in folder_paths.get_folder_paths("loras")]
    for full in (Path.absolute, Path.resolve):  # the folder may be a link, or lie in one
        for folder in map(full, folders):
            if full(path).is_relative_to(folder):
                return full(path).relative_to(folder).as_posix()
    return path.name


def apply_lora(model: Any, clip: Any, lora: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """MODEL and CLIP with a LoRA at strength 1, as from the stock loader, but complete:
    ``embedding:NAME`` finds the embeddings in it."""
    embeddings, lora = unbundled(Path("merged"), lora)
    loaded = comfy.lora.load_lora(lora, _stock_key_map(model, clip))
    model, clip = model.clone(), None if clip is None else clip.clone()
    if embeddings and clip is not None:
        names = file_names(embeddings)
        clip = with_embeddings(clip, {names[name]: parts for name, parts in embeddings.items()})
    patched = set(model.add_patches(loaded))
    patched |= set() if clip is None else set(clip.add_patches(loaded))
    modules = sum(key.endswith((".alpha", ".diff", ".diff_b")) for key in lora)
    if len(patched) != len(loaded) or len(loaded) != modules:
        raise IterisError(
            f"Only {len(patched)} of {modules} changes of the LoRA match this MODEL and CLIP."
        )
    return model, clip


def _stock_key_map(model: Any, clip: Any) -> dict[str, Any]:
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is None:
        return key_map
    return comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)


def _weight_key(target: Any) -> str:
    return target if isinstance(target, str) else target[0]


def in_denoiser(key: str) -> bool:
    return key.startswith("diffusion_model.")


def our_names(model: Any, clip: Any) -> Callable[[str], str]:
    """A function from a parameter's key in ComfyUI to its name here.

    A UNet's modules get diffusers' names; other denoisers keep their own, as in kohya files.
    """
    unet = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    named = {f"diffusion_model.{ours}": theirs for theirs, ours in unet.items()}
    encoders = [] if clip is None else [n for n, _ in clip.cond_stage_model.named_children()]
    order = [name for name in ("clip_l", "clip_h", "clip_g") if name in encoders]
    order += [name for name in encoders if name not in order]

    def name(key: str) -> str:
        if in_denoiser(key):
            module, _, leaf = key.rpartition(".")
            weight = named.get(f"{module}.weight", f"{module.removeprefix('diffusion_model.')}.")
            return f"unet.{weight.rpartition('.')[0]}.{leaf}"
        encoder, _, rest = key.partition(".")
        number = order.index(encoder) + 1 if encoder in order else 1
        component = "text_encoder" if number == 1 else f"text_encoder_{number}"
        # A layer outside the encoders, such as LTX-2's projection, keeps its name.
        rest = rest.removeprefix("transformer.") if "." in rest else key
        return f"{component}.{rest}"

    return name


def with_missing_names(key_map: dict[str, Any]) -> dict[str, Any]:
    """Names that current diffusers and transformers write but ComfyUI's maps lack."""
    added: dict[str, Any] = {}
    for name, target in key_map.items():
        if ".processor.to_" in name:
            plain = name.replace(".processor.to_", ".to_")
            added[f"{plain}.0" if plain.endswith(".to_out") else plain] = target
        if name.startswith("text_encoder") and ".text_model." in name:
            added[name.replace(".text_model.", ".", 1)] = target
    return {**added, **key_map}


def names_to_write(
    kind: Architecture, shapes: Shapes, stock: Mapping[str, Alias]
) -> dict[str, Alias]:
    """One name per site: sd-scripts' if the stock key map has it, otherwise another kohya name,
    otherwise ComfyUI's generic one (``text_encoders.…``)."""
    written = {n: a for n, a in kohya_names(kind, shapes).items() if stock.get(n) == a}
    named = {alias[0].site for alias in written.values()}
    for prefix in ("lora_unet_", "lora_te", "lora_", "text_encoders.", ""):
        for name, alias in stock.items():
            site = alias[0].site
            if name.startswith(prefix) and site not in named and alias == whole(site, shapes):
                written[name] = alias
                named.add(site)
    return written


def alias_of(site: str, shapes: Shapes, target: Any) -> Alias | str:
    """The alias for a name in ComfyUI's key map, or a description of a change that no alias can
    express.

    ``target`` is a weight key, or (key, (dimension, start, length) or None[, function on the
    change]); ComfyUI's functions swap the halves of the rows.
    """
    if isinstance(target, str):
        return whole(site, shapes)
    offset, function = (*target[1:], None)[:2]
    dimension, start, length = offset or (0, 0, shapes[site][0])
    if dimension != 0:
        return f"columns {start} to {start + length} of {site}, which is not read here"
    if start + length > shapes[site][0]:  # Lumina 2 under Z-Image's names, with fewer heads in k, v
        return f"rows {start} to {start + length} of {site}, which has {shapes[site][0]}"
    if function is None:
        return permuted(site, range(length), start)
    try:
        order = function(torch.arange(length)[:, None]).flatten().tolist()
    except Exception:  # it may need more than one column
        order = []
    if sorted(order) != list(range(length)):
        return f"{site} by a function that is not a row permutation, which is not supported"
    return permuted(site, order, start)
