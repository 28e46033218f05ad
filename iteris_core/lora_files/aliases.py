"""Every name that a LoRA file may use for a module of one base model, and the names to write.

Names are generated from the base's own sites, so a name either is one of them or is unknown;
nothing is guessed from patterns. The layouts: kohya (``lora_unet_…``, with diffusers' or the
original module names), peft and diffusers (with and without ``.processor`` and ``text_model``),
OneTrainer (``lora_transformer_…``), LyCORIS and SimpleTuner (``lycoris_…``), ComfyUI and ai-toolkit
(``diffusion_model.…``, ``text_encoders.…``), BFL (no prefix) and XLabs (``….processor.qkv_lora1``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ..architectures import ARCHITECTURES, Architecture
from ..architectures.record import (
    CONNECTORS,
    Alias,
    BaseModel,
    Shapes,
    is_t5,
    text_component,
    whole,
)
from ..architectures.sites import named_sites, weight_shape

_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def base_model(kind: Architecture, shapes: Shapes) -> BaseModel:
    """A base model whose sites are named like diffusers' and transformers' modules."""
    return BaseModel(kind, shapes, file_names(kind, shapes), kohya_names(kind, shapes))


@functools.cache
def released_base(name: str) -> BaseModel:
    """The released model of the architecture of that name, built without weights from its
    libraries."""
    (kind,) = (known for known in ARCHITECTURES if known.name == name)
    with torch.device("meta"):
        parts = {name: part.make() for name, part in kind.components.items()}
    sites = {s: m for name, part in parts.items() for s, m in named_sites(name, part).items()}
    return base_model(kind, {site: weight_shape(m) for site, m in sites.items()})


def file_names(kind: Architecture, shapes: Shapes) -> dict[str, Alias]:
    """Every known module name, with its alias."""
    aliases: dict[str, Alias] = {}
    for site in shapes:
        component = site.partition(".")[0]
        if component == kind.denoiser:
            names = _denoiser_names(site)
        elif component in CONNECTORS:
            names = (site,)
        else:
            names = _text_names(kind, site) if text_component(site) is not None else ()
        for name in names:
            aliases.setdefault(name, whole(site, shapes))
    for name, alias in (kind.original_names(shapes) | kind.further_names(shapes)).items():
        for prefix in ("diffusion_model.", "", "base_model.model.", "model.diffusion_model."):
            aliases.setdefault(prefix + name, alias)
        aliases.setdefault(_flat("lora_unet", name), alias)
    return aliases


def kohya_names(kind: Architecture, shapes: Shapes) -> dict[str, Alias]:
    """sd-scripts' module names, which are the ones to write."""
    original = kind.original_names(shapes) if kind.native else {}
    names = {_flat("lora_unet", name): alias for name, alias in original.items()}
    for site in shapes:
        component, _, path = site.partition(".")
        index = text_component(site)
        if index is not None and index < len(kind.text_prefixes):
            names[_flat(kind.text_prefixes[index], path)] = whole(site, shapes)
        elif component == kind.denoiser and not kind.native:
            names[_flat("lora_unet", path)] = whole(site, shapes)
    return names


def _flat(prefix: str, name: str) -> str:
    return f"{prefix}_{name.replace('.', '_')}"


def _denoiser_names(site: str) -> Iterator[str]:
    component, _, path = site.partition(".")
    variants = [path, path.replace(".to_", ".processor.to_")]
    variants += [name.removesuffix(".0") for name in variants if name.endswith("to_out.0")]
    for name in variants:
        for prefix in (f"{component}.", "", "base_model.model.", f"{component}.base_model.model."):
            yield prefix + name
    if component == "transformer":
        yield f"diffusion_model.{path}"
    for prefix in ("lora_unet", "lora_transformer", "lycoris"):
        yield _flat(prefix, path)


def _text_names(kind: Architecture, site: str) -> Iterator[str]:
    component, _, path = site.partition(".")
    index = text_component(site) or 0
    parent, _, leaf = path.rpartition(".")
    for name in (path, f"{parent}.{_OLD_TEXT.get(leaf, leaf)}"):
        for dotted in (name, name.removeprefix("text_model.")):
            yield f"{component}.{dotted}"
            yield f"{component}.base_model.model.{dotted}"
    encoder = "t5xxl" if is_t5(site) else kind.clips[min(index, len(kind.clips) - 1)]
    yield f"text_encoders.{encoder}.transformer.{path}"  # ComfyUI's
    prefixes = [*kind.text_prefixes[index : index + 1], f"lora_te{index + 1}"]
    if index == 0:
        prefixes.append("lora_te")
    elif is_t5(site):
        prefixes.append("lora_te3")  # sd-scripts does not number it; OneTrainer does
    for prefix in prefixes:
        yield _flat(prefix, path)
        yield _flat(prefix, path.removeprefix("text_model."))
