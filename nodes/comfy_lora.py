"""Sites and LoRA files of a MODEL and CLIP, through ComfyUI's own key maps and adapters."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management as memory
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from ..iteris_core.bases import Base, describe_base
from ..iteris_core.errors import IterisError, LoraFileError
from ..iteris_core.linalg.lowrank import extract
from ..iteris_core.lora import Lora, LowRank, concatenate
from ..iteris_core.lora_files import ReadOptions
from ..iteris_core.lora_files.dora import fold_magnitude
from ..iteris_core.lora_files.embeddings import split_embeddings
from ..iteris_core.lora_files.rebuild import Rebuilt, rebuild
from ..iteris_core.lora_files.tensors import file_digest, read_tensors
from .peft_parts import as_comfyui_names_them

_PARTS = {
    "lora": ("up", "down", "alpha", "mid", "magnitude", "reshape"),
    "loha": ("hada_w1_a", "hada_w1_b", "alpha", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
             "magnitude"),
    "lokr": ("lokr_w1", "lokr_w2", "alpha", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b",
             "lokr_t2", "magnitude"),
}  # fmt: skip
"""A ComfyUI adapter's name → what its ``weights`` are."""


class ComfySites:
    """What a LoRA can change in a MODEL and CLIP.

    ``key_map`` is ComfyUI's, name in a LoRA file → weight key (and slice of it), with names added
    that it lacks; ``names`` maps weight keys to sites, ``modules`` sites to modules.
    """

    def __init__(self, model: Any, clip: Any) -> None:
        self._model, self._clip = model, clip
        self.key_map = _with_missing_names(_stock_key_map(model, clip))
        self.names = _site_names(model, clip, set(map(_weight_key, self.key_map.values())))
        self.modules = {site: self._module(key) for key, site in self.names.items()}
        self._keys = {site: key for key, site in self.names.items()}
        self._base = _known_base(model, self.modules)

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        """Any file that ComfyUI reads, and those of diffusers that it reads only in part.

        Whatever would be left out is an error; with ``allow_partial`` it is a note.
        """
        path, options = Path(path), options or ReadOptions()
        tensors, metadata = read_tensors(path)
        embeddings, tensors = split_embeddings(path, tensors)
        state = comfy.lora_convert.convert_lora(as_comfyui_names_them(path, tensors, metadata))
        loaded = comfy.lora.load_lora(state, self.key_map, log_missing=False)
        unread = self._unread(state, loaded)
        if unread and not options.allow_partial:
            raise LoraFileError(
                f"{path}: {len(unread)} of {len(state)} keys match nothing in this MODEL and CLIP, "
                f"such as {unread[0]} {tuple(state[unread[0]].shape)}; was the LoRA made for "
                "another base model?"
            )
        notes = [f"left out: {key}" for key in unread]
        counts: Counter[str] = Counter()
        parts: dict[str, list[LowRank]] = {}
        for target, adapter in loaded.items():
            key = _weight_key(target)
            if key not in self.names:
                raise LoraFileError(f"{path}: {key} is no linear layer or 2D convolution.")
            site = self.names[key]
            change = self._change(path, site, target, adapter, options, counts)
            if change is not None:
                parts.setdefault(site, []).append(change)
        if counts["extracted"]:
            notes.append(f"{counts['extracted']} sites were not low rank and were extracted at "
                         f"{options.energy:.4%} of their energy")  # fmt: skip
        if counts["zero"]:
            notes.append(f"{counts['zero']} sites have a change of exactly zero and are left out: "
                         "they change nothing")  # fmt: skip
        sites = {site: concatenate(some) for site, some in parts.items()}
        return Lora(
            sites,
            path.stem,
            metadata,
            _name_of(path),
            file_digest(path),
            self._base,
            notes=notes,
            embeddings=embeddings,
        )

    def _module(self, key: str) -> nn.Module:
        root = self._model.model if _in_denoiser(key) else self._clip.cond_stage_model
        return root.get_submodule(key.removesuffix(".weight"))

    def _unread(self, state: Mapping[str, Tensor], loaded: Mapping[Any, Any]) -> list[str]:
        used = {key for adapter in loaded.values() for key in getattr(adapter, "loaded_keys", ())}
        # Full differences are plain tuples there, which do not say where they are from.
        used |= {f"{name}.diff" for name in self.key_map}
        return [key for key in state if key not in used and not key.endswith(".alpha")]

    def _change(
        self,
        path: Path,
        site: str,
        target: Any,
        adapter: Any,
        options: ReadOptions,
        counts: Counter[str],
    ) -> LowRank | None:
        """The change of a site, or None if it is zero; pieces of it stand at their place in it."""
        place = f"{path}: site {site}"
        parts = _parts(place, adapter)
        out, width, *window = shape = _shape(self.modules[site])
        kernel = (window[0], window[1]) if window else None
        offset, function = (None, None) if isinstance(target, str) else (*target[1:], None)[:2]
        if offset is not None:
            shape = tuple(offset[2] if i == offset[0] else n for i, n in enumerate(shape))
        change = rebuild(parts, shape, None, place)
        if "magnitude" in parts and options.magnitudes:
            weight = self._weight(site)
            if offset is not None:
                weight = weight.narrow(*offset)
            folded = fold_magnitude(change.matrix(), weight.flatten(1), parts, place)
            change = Rebuilt(1.0, dense=folded)
        if change.up is not None and change.down is not None:
            up, down = change.up * change.scale, change.down
        else:
            dense = change.matrix()
            if not bool(dense.any()):
                counts["zero"] += 1
                return None
            low = extract(dense, options.energy)[0]
            up, down = low.up, low.down
            counts["extracted"] += 1
        if not bool(up.any()) or not bool(down.any()):
            counts["zero"] += 1
            return None
        if function is not None:
            up = function(up)
        if offset is not None:
            up, down = _at(offset, up, down, (out, width * math.prod(window)))
        return LowRank(up, down, kernel)

    def _weight(self, site: str) -> Tensor:
        """The base's weight in float32, with the LoRAs that are on it already."""
        key = self._keys[site]
        patcher = self._model if _in_denoiser(key) else self._clip.patcher
        (weight, convert), *patches = patcher.get_key_patches(key)[key]
        weight = memory.cast_to_device(weight, torch.device("cpu"), torch.float32, copy=True)
        return comfy.lora.calculate_weight(patches, convert(weight, inplace=True), key).detach()


def apply_lora(model: Any, clip: Any, lora: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """MODEL and CLIP with a LoRA at strength 1, as the stock loader does it, but nothing lost."""
    loaded = comfy.lora.load_lora(lora, _stock_key_map(model, clip))
    model, clip = model.clone(), clip.clone()
    patched = {*model.add_patches(loaded), *clip.add_patches(loaded)}
    modules = sum(key.endswith(".alpha") for key in lora)
    if len(patched) != len(loaded) or len(loaded) != modules:
        raise IterisError(
            f"Only {len(patched)} of {modules} changes of the LoRA fit this MODEL and CLIP."
        )
    return model, clip


def _stock_key_map(model: Any, clip: Any) -> dict[str, Any]:
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
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
    encoders = [name for name, _ in clip.cond_stage_model.named_children()]
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
            name = f"{component}.{rest.removeprefix('transformer.')}"
        names[key] = name.removesuffix(".weight")
    return names


def _known_base(model: Any, sites: Mapping[str, Any]) -> Base | None:
    """What the file writer takes a UNet's names from; other denoisers' are kohya's already."""
    if not comfy.utils.unet_to_diffusers(model.model.model_config.unet_config):
        return None
    return describe_base({site: _shape(module) for site, module in sites.items()})


def _shape(module: Any) -> tuple[int, ...]:
    """Of the weight, which may be stored in another shape where it is quantised."""
    if isinstance(module, nn.Conv2d):
        return (module.out_channels, module.in_channels, *module.kernel_size)
    return (module.out_features, module.in_features)


def _is_site(root: nn.Module, path: str) -> bool:
    try:
        module = root.get_submodule(path)
    except AttributeError:
        return False
    # Quantised layers are no nn.Linear, but say how wide they are.
    return isinstance(module, nn.Conv2d) or hasattr(module, "in_features")


def _parts(place: str, adapter: Any) -> dict[str, Tensor]:
    """The tensors of what ComfyUI loaded, by the names of :mod:`iteris_core.lora_files.parts`."""
    if isinstance(adapter, tuple) and adapter[0] == "diff":
        return {"diff": adapter[1][0]}
    kind = getattr(adapter, "name", "a replaced weight")
    parts = dict(zip(_PARTS.get(kind, ()), getattr(adapter, "weights", ()), strict=False))
    if not parts or parts.pop("reshape", None) is not None:
        raise LoraFileError(
            f"{place} is changed by {kind}, which a LoRA cannot represent; merge without this file."
        )
    found = {name: part for name, part in parts.items() if part is not None}
    if "alpha" in found:
        found["alpha"] = torch.tensor(float(found["alpha"]))
    return found


def _at(
    offset: tuple[int, int, int], up: Tensor, down: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Factors of a whole weight from those of a slice of it, such as q in a fused qkv."""
    dim, start, length = offset
    end = shape[dim] - start - length
    pad = nn.functional.pad
    return (pad(up, (0, 0, start, end)), down) if dim == 0 else (up, pad(down, (start, end)))
