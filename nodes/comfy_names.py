"""Names of ComfyUI's modules: site names, and names in LoRA files, from the stock loader's key
map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..iteris_core.architectures import Architecture
from ..iteris_core.architectures.row_mapping import Alias, Shapes, permuted, whole
from ..iteris_core.lora_files.aliases import kohya_names
from .comfy_internals import comfy


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


def best_names(stock: Mapping[str, Any]) -> dict[str, str]:
    """Key of a whole tensor → its name for writing: sd-scripts' for a UNet, with diffusers' module
    names, or ComfyUI's own."""
    best: dict[str, str] = {}
    for prefix in ("lora_unet_", "text_encoders.", ""):
        for name, target in reversed(stock.items()):
            if isinstance(target, str) and name.startswith(prefix):
                best.setdefault(target, name)
    return best


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
    rows = torch.arange(length)[:, None]
    if function is None:
        return permuted(site, range(length), start)
    try:
        order = function(rows).flatten()
    except Exception as error:  # it may need more than one column
        return f"{site} by an unknown function ({error})"
    if order.dtype != rows.dtype or order.sort().values.tolist() != list(range(length)):
        return f"{site} by a function that is not a row permutation, which is not supported"
    return permuted(site, order.tolist(), start)
