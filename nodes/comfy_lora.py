"""Sites of a MODEL and CLIP, and LoRA files for them: ComfyUI's key maps as our aliases."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from torch import Tensor, nn

from ..iteris_core.architectures import Architecture, architecture_of_sites
from ..iteris_core.architectures.row_mapping import Alias, Shapes, permuted, whole
from ..iteris_core.architectures.sites import weight_shape
from ..iteris_core.errors import BaseError, IterisError, LoraFileError
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import BaseModel, ReadOptions, read_lora_file
from ..iteris_core.lora_files.aliases import kohya_names
from ..iteris_core.lora_files.embeddings import file_names, unbundled
from ..iteris_core.lora_files.parts import split_key
from .comfy_internals import comfy, memory
from .comfy_learned import with_embeddings

_TEXT = re.compile(r"(lora|lycoris)_te|text_encoder|te\d?[._]|clip_[lgh]\.|t5xxl|text_model|cond_")
"""The beginning of text encoders' names in LoRA files."""
_NO_SITE = "no weight of a linear layer or a 2D convolution, which alone are merged"


class ComfySites:
    """The weights of a MODEL and CLIP that a LoRA can change.

    ``key_map`` is ComfyUI's, name in a LoRA file → weight key (and slice of it), with names added
    that it lacks; ``names`` maps weight keys to sites, ``modules`` sites to modules. ``base`` has
    the key map as aliases of the sites, and for every site one name that the stock loader takes.
    """

    def __init__(self, model: Any, clip: Any) -> None:
        if any(map(_is_nunchaku, model.model.modules())):
            raise BaseError(
                "MODEL is one of Nunchaku's, whose layers are fused: what they receive cannot be "
                "seen there. Merge on the model that it was made from, for instance in fp8 or GGUF."
            )
        self._model, self._clip = model, clip
        stock = _stock_key_map(model, clip)
        self.key_map = _with_missing_names(stock)
        self.names = _site_names(model, clip, set(map(_weight_key, self.key_map.values())))
        self.modules = {site: self._module(key) for key, site in self.names.items()}
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
            alias = _alias(site, shapes, target)
            if isinstance(alias, str):
                self._refused[name] = alias
            else:
                aliases[name] = alias
        kind = _architecture(model, shapes)
        written = _names_to_write(kind, shapes, {n: a for n, a in aliases.items() if n in stock})
        self.base = BaseModel(kind, shapes, aliases, written)

    def read_lora(
        self, path: str | Path, options: ReadOptions | None = None, *, text: bool = True
    ) -> Lora:
        """Any file that ComfyUI reads, and those of diffusers that it reads only in part.

        Whatever would be left out is an error; with ``allow_partial`` it is a note. Without
        ``text`` what it changes in text encoders is not looked at.
        """
        path, options = Path(path), options or ReadOptions()

        def convert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            of_text = [key for key in tensors if _TEXT.match(key)]
            if not text:
                tensors = {key: t for key, t in tensors.items() if not _TEXT.match(key)}
            elif of_text and self._clip is None and not options.allow_partial:
                raise LoraFileError(
                    f"{path.name} changes the text encoder ({of_text[0]}), and no CLIP is "
                    "connected; connect it, or set the LoRA's strength there to 0."
                )
            # BFL's, Wan-Fun's and USO's keys, and what later versions know.
            converted = comfy.lora_convert.convert_lora(tensors)
            for key in converted if not options.allow_partial else ():
                name = (split_key(key, self._refused) or ("", ""))[0]
                if name in self._refused:
                    raise LoraFileError(f"{path}: {key} changes {self._refused[name]}.")
            return converted

        lora = read_lora_file(path, self.base, self.weight, options, convert)
        return replace(lora, source=_name_of(path))

    def _module(self, key: str) -> nn.Module:
        root = self._model.model if _in_denoiser(key) else self._clip.cond_stage_model
        return root.get_submodule(key.removesuffix(".weight"))

    def weight(self, site: str) -> Tensor:
        """The base's weight in float32, with the LoRAs that are on it already."""
        key = self._keys[site]
        patcher = self._model if _in_denoiser(key) else self._clip.patcher
        (weight, convert), *patches = patcher.get_key_patches(key)[key]
        if not weight.is_floating_point():
            made = getattr(self.modules[site], "get_weight", None)  # as ComfyUI-GGUF's layers have
            if made is None:
                raise BaseError(
                    f"A DoRA, OFT or GLoRA, or an extraction, needs the base's weight of {site}, "
                    "and this base has it as bytes of a quantised file (GGUF), which are not read "
                    "here; load the base from a safetensors file."
                )
            whole: Tensor = made(weight, torch.float32)
            if getattr(weight, "patches", None):  # which are in it then
                return whole.detach()
            weight = whole
        weight = memory.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, convert(weight, inplace=True), key).detach()


def apply_lora(model: Any, clip: Any, lora: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """MODEL and CLIP with a LoRA at strength 1, as the stock loader does it, but nothing lost:
    the embeddings in it are behind ``embedding:NAME``."""
    embeddings, lora = unbundled(Path("merged"), lora)
    loaded = comfy.lora.load_lora(lora, _stock_key_map(model, clip))
    model, clip = model.clone(), None if clip is None else clip.clone()
    if embeddings and clip is not None:
        names = file_names(embeddings)
        clip, _ = with_embeddings(clip, {names[name]: parts for name, parts in embeddings.items()})
    patched = set(model.add_patches(loaded))
    patched |= set() if clip is None else set(clip.add_patches(loaded))
    modules = sum(key.endswith(".alpha") for key in lora)
    if len(patched) != len(loaded) or len(loaded) != modules:
        raise IterisError(
            f"Only {len(patched)} of {modules} changes of the LoRA fit this MODEL and CLIP."
        )
    return model, clip


def _stock_key_map(model: Any, clip: Any) -> dict[str, Any]:
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is None:
        return key_map
    return comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)


def _with_missing_names(key_map: dict[str, Any]) -> dict[str, Any]:
    """Names that today's diffusers and transformers write and ComfyUI's maps lack."""
    added: dict[str, Any] = {}
    for name, target in key_map.items():
        if ".processor.to_" in name:
            plain = name.replace(".processor.to_", ".to_")
            added[f"{plain}.0" if plain.endswith(".to_out") else plain] = target
        if name.startswith("text_encoder") and ".text_model." in name:
            added[name.replace(".text_model.", ".", 1)] = target
    return {**added, **key_map}


def _name_of(path: Path) -> str:
    """The name below models/loras, as Load LoRA lists it; of a file elsewhere its own name."""
    for folder in folder_paths.get_folder_paths("loras"):
        if path.resolve().is_relative_to(Path(folder).resolve()):
            return path.resolve().relative_to(Path(folder).resolve()).as_posix()
    return path.name


def _weight_key(target: Any) -> str:
    return target if isinstance(target, str) else target[0]


def _in_denoiser(key: str) -> bool:
    return key.startswith("diffusion_model.")


def _site_names(model: Any, clip: Any, keys: set[str]) -> dict[str, str]:
    """Weight key → site, for every linear layer and 2D convolution that a LoRA can name.

    A UNet's sites have diffusers' names, other denoisers' their own, which is what a kohya file
    calls them.
    """
    unet = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    named = {f"diffusion_model.{ours}": theirs for theirs, ours in unet.items()}
    encoders = [] if clip is None else [n for n, _ in clip.cond_stage_model.named_children()]
    order = [name for name in ("clip_l", "clip_h", "clip_g") if name in encoders]
    order += [name for name in encoders if name not in order]
    names: dict[str, str] = {}
    for key in sorted(keys):
        root = model.model if _in_denoiser(key) else clip.cond_stage_model
        if not key.endswith(".weight") or not _is_site(root, key.removesuffix(".weight")):
            continue
        if _in_denoiser(key):
            name = f"unet.{named.get(key, key.removeprefix('diffusion_model.'))}"
        else:
            encoder, _, rest = key.partition(".")
            number = order.index(encoder) + 1
            component = "text_encoder" if number == 1 else f"text_encoder_{number}"
            # A layer beside the encoders, such as LTX-2's projection, keeps its name.
            rest = rest.removeprefix("transformer.") if "." in rest else key
            name = f"{component}.{rest}"
        names[key] = name.removesuffix(".weight")
    return names


def _architecture(model: Any, shapes: Shapes) -> Architecture:
    """A UNet's, whose sites have diffusers' names; of others their class's name is all there is."""
    unet = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    kind = architecture_of_sites(shapes) if unet else None
    return kind or Architecture("comfyui", type(model.model).__name__, denoiser="unet")


def _alias(site: str, shapes: Shapes, target: Any) -> Alias | str:
    """The alias behind a name of ComfyUI's key map, or in words a change that no alias can say.

    ``target`` is a weight key, or (key, (dimension, start, length) or None[, function on the
    change]), of which ComfyUI has swaps of the halves of the rows.
    """
    if isinstance(target, str):
        return whole(site, shapes)
    offset, function = (*target[1:], None)[:2]
    dimension, start, length = offset or (0, 0, shapes[site][0])
    if dimension != 0:
        return f"columns {start} to {start + length} of {site}, which is not read here"
    if start + length > shapes[site][0]:  # Lumina 2 under Z-Image's names, with fewer heads in k, v
        return f"rows {start} to {start + length} of {site}, which has {shapes[site][0]}"
    rows = torch.arange(length)[:, None]
    if function is None:
        return permuted(site, range(length), start)
    try:
        order = function(rows).flatten()
    except Exception as error:  # it may want more than one column
        return f"{site} by a function that is not known here ({error})"
    if order.dtype != rows.dtype or order.sort().values.tolist() != list(range(length)):
        return f"{site} by a function that is no order of its rows, which is not read here"
    return permuted(site, order.tolist(), start)


def _names_to_write(
    kind: Architecture, shapes: Shapes, stock: Mapping[str, Alias]
) -> dict[str, Alias]:
    """One name of every site: sd-scripts' where the stock key map has it, else another of kohya's,
    else ComfyUI's generic one (``text_encoders.…``)."""
    written = {n: a for n, a in kohya_names(kind, shapes).items() if stock.get(n) == a}
    named = {alias[0].site for alias in written.values()}
    for prefix in ("lora_unet_", "lora_te", "lora_", "text_encoders.", ""):
        for name, alias in stock.items():
            site = alias[0].site
            if name.startswith(prefix) and site not in named and alias == whole(site, shapes):
                written[name] = alias
                named.add(site)
    return written


def _is_nunchaku(module: nn.Module) -> bool:
    kind = type(module)
    return "nunchaku" in f"{kind.__module__}.{kind.__name__}".lower()


def _is_site(root: nn.Module, path: str) -> bool:
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return False
    # Quantised layers are no nn.Linear, but say how wide they are.
    return isinstance(module, nn.Conv2d) or hasattr(module, "in_features")
