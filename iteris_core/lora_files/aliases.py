"""Every name that a LoRA file may use for a module of one base model, and the names to write.

Names are made from the base's own sites, so a name either is one of them or it is unknown; nothing
is guessed from patterns. The layouts: kohya (``lora_unet_…``, with diffusers' or the original
module names), peft and diffusers (with and without ``.processor`` and ``text_model``), OneTrainer
(``lora_transformer_…``), LyCORIS and SimpleTuner (``lycoris_…``), ComfyUI and ai-toolkit
(``diffusion_model.…``, ``text_encoders.…``), BFL (no prefix) and XLabs (``….processor.qkv_lora1``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from ..architectures import Architecture, architecture
from ..architectures.pieces import Alias, Shapes, whole
from ..architectures.sites import named_sites, weight_shape
from ..architectures.text import is_t5, text_component

_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class BaseModel:
    """All that reading and writing a LoRA file takes: ``shapes`` maps every site to the shape of
    its weight, ``aliases`` every name that a file may use for a module, with its prefix and without
    the leaf, to what it stands for. ``written`` are the names to write, whole sites each."""

    architecture: Architecture
    shapes: Shapes
    aliases: Mapping[str, Alias]
    written: Mapping[str, Alias]


def base_model(kind: Architecture, shapes: Shapes) -> BaseModel:
    """A base model whose sites have the names of diffusers' and transformers' modules."""
    return BaseModel(kind, shapes, file_names(kind, shapes), kohya_names(kind, shapes))


@functools.cache
def released_base(name: str) -> BaseModel:
    """The released model of an architecture, made without weights; needs diffusers and
    transformers. Raises :class:`IterisError` for an unknown name."""
    kind = architecture(name)
    with torch.device("meta"):
        sites = [named_sites(component, model) for component, model in kind.models().items()]
    return base_model(kind, {site: weight_shape(m) for some in sites for site, m in some.items()})


def file_names(kind: Architecture, shapes: Shapes) -> dict[str, Alias]:
    """Every known module name, and what it stands for."""
    aliases: dict[str, Alias] = {}

    def add(names: Iterator[str], alias: Alias) -> None:
        for name in names:
            aliases.setdefault(name, alias)

    for site in shapes:
        component, _, path = site.partition(".")
        alias = whole(site, shapes)
        if component == kind.denoiser:
            add(_denoiser_names(component, path), alias)
        elif (index := text_component(site)) is not None:
            add(_text_names(kind, index, site), alias)
    for name, alias in (kind.original_names(shapes) | kind.further_names(shapes)).items():
        add(_original_names(name), alias)
    return aliases


def kohya_names(kind: Architecture, shapes: Shapes) -> dict[str, Alias]:
    """The names that sd-scripts gives the modules: the ones to write."""
    names: dict[str, Alias] = {}
    if kind.native:
        for name, alias in kind.original_names(shapes).items():
            names["lora_unet_" + name.replace(".", "_")] = alias
    for site in shapes:
        component, _, path = site.partition(".")
        index = text_component(site)
        if index is not None and index < len(kind.text_prefixes):
            name = f"{kind.text_prefixes[index]}_{path.replace('.', '_')}"
            names[name] = whole(site, shapes)
        elif component == kind.denoiser and not kind.native:
            names["lora_unet_" + path.replace(".", "_")] = whole(site, shapes)
    return names


def _denoiser_names(component: str, path: str) -> Iterator[str]:
    variants = [path, path.replace(".to_", ".processor.to_")]
    variants += [name.removesuffix(".0") for name in variants if name.endswith("to_out.0")]
    for name in variants:
        for prefix in (f"{component}.", "", "base_model.model.", f"{component}.base_model.model."):
            yield prefix + name
    if component == "transformer":
        yield f"diffusion_model.{path}"
    yield from (
        prefix + path.replace(".", "_")
        for prefix in ("lora_unet_", "lora_transformer_", "lycoris_")
    )


def _original_names(name: str) -> Iterator[str]:
    for prefix in ("diffusion_model.", "", "base_model.model.", "model.diffusion_model."):
        yield prefix + name
    yield "lora_unet_" + name.replace(".", "_")


def _text_names(kind: Architecture, index: int, site: str) -> Iterator[str]:
    component, _, path = site.partition(".")
    short = path.removeprefix("text_model.")
    parent, _, leaf = path.rpartition(".")
    dotted = {path, short}
    if leaf in _OLD_TEXT:
        dotted |= {f"{parent}.{_OLD_TEXT[leaf]}"}
        dotted |= {f"{parent.removeprefix('text_model.')}.{_OLD_TEXT[leaf]}"}
    for name in sorted(dotted):
        yield f"{component}.{name}"
        yield f"{component}.base_model.model.{name}"
    encoder = "t5xxl" if is_t5(site) else kind.clips[min(index, len(kind.clips) - 1)]
    yield f"text_encoders.{encoder}.transformer.{path}"
    for prefix in _text_prefixes(kind, index, is_t5(site)):
        yield f"{prefix}_{path.replace('.', '_')}"
        yield f"{prefix}_{short.replace('.', '_')}"


def _text_prefixes(kind: Architecture, index: int, of_t5: bool) -> list[str]:
    usual = list(kind.text_prefixes[index : index + 1])
    if index == 0:
        return [*usual, "lora_te", "lora_te1"]
    if of_t5:
        return [*usual, f"lora_te{index + 1}", "lora_te3"]  # OneTrainer counts, sd-scripts: te3
    return [*usual, f"lora_te{index + 1}"]
