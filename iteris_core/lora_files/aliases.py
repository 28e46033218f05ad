"""Every name that a LoRA file may use for a module of one base model, and the names to write.

Names are generated from the base's own sites, so a name either is one of them or is unknown;
nothing is guessed from patterns. The layouts: kohya (``lora_unet_…``, with diffusers' or the
original module names), peft and diffusers (with and without ``.processor`` and ``text_model``),
OneTrainer (``lora_transformer_…``), LyCORIS and SimpleTuner (``lycoris_…``), ComfyUI and ai-toolkit
(``diffusion_model.…``, ``text_encoders.…``), BFL (no prefix) and XLabs (``….processor.qkv_lora1``).

A file stores changes of biases and normalisations in full: ``….diff`` for a one-dimensional weight,
``….diff_b`` for the bias of any module. ComfyUI's stock loader reads them under kohya's names, or
under its own for modules that sd-scripts never trains. peft's layout has no place for them.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..architectures import Architecture, architecture
from ..architectures.record import (
    CONNECTORS,
    Alias,
    Shapes,
    file_rows,
    is_t5,
    text_component,
    whole,
)
from ..architectures.sites import named_sites, other_parameters, weight_shape
from ..errors import LoraFileError, OutputError

_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class BaseModel:
    """Everything needed to read and write a LoRA file. ``shapes`` maps every site to its weight's
    shape. ``aliases`` maps every name that a file may use for a module, with prefix and without
    leaf, to its alias. ``written`` are the names to write, each for a whole site; ``vectors`` are
    keys for changes of biases and normalisations, by parameter name."""

    architecture: Architecture
    shapes: Shapes
    aliases: Mapping[str, Alias]
    written: Mapping[str, Alias]
    vectors: Mapping[str, Alias] = field(default_factory=dict[str, Alias])


def base_model(
    kind: Architecture, shapes: Shapes, parameters: Mapping[str, nn.Module] | None = None
) -> BaseModel:
    """A base model whose sites are named like diffusers' and transformers' modules; ``parameters``
    are as in :meth:`..hosts.protocol.Host.parameters`."""
    written = kohya_names(kind, shapes)
    others = {
        name: tuple(getattr(module, name.rpartition(".")[2]).shape)
        for name, module in (parameters or {}).items()
    }
    vectors = vector_names(_module_names(kind, others), written, others)
    return BaseModel(kind, shapes, file_names(kind, shapes), written, vectors)


@functools.cache
def released_base(name: str) -> BaseModel:
    """The released model of an architecture, built without weights from its libraries."""
    kind = architecture(name)
    with torch.device("meta"):
        parts = {name: part.make() for name, part in kind.components.items()}
    sites = {s: m for name, part in parts.items() for s, m in named_sites(name, part).items()}
    others = {n: m for name, part in parts.items() for n, m in other_parameters(name, part).items()}
    return base_model(kind, {site: weight_shape(m) for site, m in sites.items()}, others)


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


def _module_names(kind: Architecture, parameters: Shapes) -> dict[str, str]:
    """Module → ComfyUI's name for its vectors, in UNets and text encoders, of any size."""
    names: dict[str, str] = {}
    for parameter in parameters:
        module = parameter.rpartition(".")[0]
        component, _, path = module.partition(".")
        if text_component(module) is not None:
            names[module] = _comfyui_text_name(kind, module)
        elif component == kind.denoiser == "unet":
            names[module] = _flat("lora_unet", path)
    return names


def _comfyui_text_name(kind: Architecture, site: str) -> str:
    index = text_component(site) or 0
    encoder = "t5xxl" if is_t5(site) else kind.clips[min(index, len(kind.clips) - 1)]
    return f"text_encoders.{encoder}.transformer.{site.partition('.')[2]}"


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
    yield _comfyui_text_name(kind, site)
    prefixes = [*kind.text_prefixes[index : index + 1], f"lora_te{index + 1}"]
    if index == 0:
        prefixes.append("lora_te")
    elif is_t5(site):
        prefixes.append("lora_te3")  # sd-scripts does not number it; OneTrainer does
    for prefix in prefixes:
        yield _flat(prefix, path)
        yield _flat(prefix, path.removeprefix("text_model."))


_LEAVES = {"weight": ".diff", "bias": ".diff_b"}


def vector_names(
    names: Mapping[str, str], written: Mapping[str, Alias], shapes: Shapes
) -> dict[str, Alias]:
    """Key in a file → the parameters among ``shapes`` that it changes. ``names`` are the file's
    names by module, or by parameter if it is neither weight nor bias; ``written`` are the sites'
    names, whose biases are fused in the same way."""
    found: dict[str, Alias] = {}
    for name, alias in written.items():
        biases = tuple(replace(piece, site=f"{piece.site}.bias") for piece in alias)
        if all(piece.site in shapes for piece in biases):
            found[f"{name}.diff_b"] = biases
    placed = {piece.site for alias in found.values() for piece in alias}
    for parameter, shape in shapes.items():
        module, _, leaf = parameter.rpartition(".")
        name, end = names.get(parameter), ".diff"
        if leaf in _LEAVES:
            name, end = names.get(module), _LEAVES[leaf]
        if len(shape) == 1 and name is not None and parameter not in placed:
            found[name + end] = whole(parameter, shapes)
    return found


def placed(vectors: Container[str], keys: Mapping[str, Alias]) -> set[str]:
    """The ``vectors`` for which ``keys`` have a place."""
    return {piece.site for alias in keys.values() for piece in alias if piece.site in vectors}


def vectors_to_file(
    vectors: Mapping[str, Tensor], keys: Mapping[str, Alias], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Tensors of a file; raises :class:`OutputError` for what has no place or is too large."""
    missing = sorted(vectors.keys() - placed(vectors, keys))
    if missing:
        raise OutputError(
            f"{len(missing)} changes of biases and normalisations have no place in this layout, "
            f"such as {missing[0]}; use kohya, which holds all that a file can hold."
        )
    tensors: dict[str, Tensor] = {}
    for key, alias in keys.items():
        own = [piece for piece in alias if piece.site in vectors]
        if own:
            tensor = torch.zeros(file_rows(alias))
            for piece in own:
                piece.place(vectors[piece.site].float().cpu(), tensor)
            tensors[key] = tensor.to(dtype)
            if not bool(torch.isfinite(tensors[key]).all()):
                raise OutputError(f"{key}: values are too large for {dtype}; write float32.")
    return tensors


def vectors_of_file(place: str, tensor: Tensor, alias: Alias) -> dict[str, Tensor]:
    """Parameter → its change, (n,), from a tensor; raises :class:`LoraFileError` on a misfit."""
    if tensor.shape != (file_rows(alias),) or not tensor.is_floating_point():
        raise LoraFileError(
            f"{place} is {tuple(tensor.shape)} {tensor.dtype}, where the base model has "
            f"{file_rows(alias)} numbers; this LoRA was made for another base model."
        )
    return {piece.site: piece.of_file(tensor.float()) for piece in alias}
