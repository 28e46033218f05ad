"""Every name that a LoRA file may use for a module of one base model.

Names are made from the base's own sites, so a name either is one of them or it is unknown; nothing
is guessed from patterns. The layouts: kohya (``lora_unet_…``, with diffusers' or the original
module names), peft and diffusers (with and without ``.processor`` and ``text_model``), OneTrainer
(``lora_transformer_…``), LyCORIS and SimpleTuner (``lycoris_…``), ComfyUI and ai-toolkit
(``diffusion_model.…``, ``text_encoders.…``), BFL (no prefix) and XLabs (``….processor.qkv_lora1``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ..bases import Base, text_component
from .mmdit_names import Alias, Piece, original_aliases, xlabs_aliases
from .unet_names import original_names

_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def whole(site: str, shapes: Mapping[str, tuple[int, ...]]) -> Alias:
    """The alias of a module that is one site."""
    return (Piece(site, ((0, shapes[site][0]),)),)


def native_aliases(base: Base) -> dict[str, Alias]:
    """Names of the original code for the denoiser's modules, without any prefix."""
    prefix = f"{base.denoiser}."
    sites = {s: shape for s, shape in base.shapes.items() if s.startswith(prefix)}
    if base.denoiser == "transformer":
        return original_aliases(base.kind.name, sites)
    named = original_names(site.removeprefix(prefix) for site in sites)
    return {name: whole(prefix + path, sites) for path, name in named.items()}


def all_aliases(base: Base) -> dict[str, Alias]:
    """Every known module name, with its prefix and without the leaf, and what it stands for."""
    found: dict[str, Alias] = {}

    def add(names: Iterator[str], alias: Alias) -> None:
        for name in names:
            found.setdefault(name, alias)

    for site in base.shapes:
        component, _, path = site.partition(".")
        alias = whole(site, base.shapes)
        if component == base.denoiser:
            add(_denoiser_names(component, path), alias)
        elif (index := text_component(site)) is not None:
            add(_text_names(base, component, index, path), alias)
    native = native_aliases(base)
    if base.kind.name == "flux":
        native |= xlabs_aliases(native)
    for name, alias in native.items():
        add(_original_names(name), alias)
    return found


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


def _text_names(base: Base, component: str, index: int, path: str) -> Iterator[str]:
    short = path.removeprefix("text_model.")
    is_t5 = path.startswith(("encoder.block.", "shared"))
    parent, _, leaf = path.rpartition(".")
    dotted = {path, short}
    if leaf in _OLD_TEXT:
        dotted |= {f"{parent}.{_OLD_TEXT[leaf]}"}
        dotted |= {f"{parent.removeprefix('text_model.')}.{_OLD_TEXT[leaf]}"}
    for name in sorted(dotted):
        yield f"{component}.{name}"
        yield f"{component}.base_model.model.{name}"
    clip = "t5xxl" if is_t5 else ("clip_l", "clip_g")[min(index, 1)]
    yield f"text_encoders.{clip}.transformer.{path}"
    if base.kind.name == "sd2":
        yield f"text_encoders.clip_h.transformer.{path}"
    for prefix in _text_prefixes(base, index, is_t5):
        yield f"{prefix}_{path.replace('.', '_')}"
        yield f"{prefix}_{short.replace('.', '_')}"


def _text_prefixes(base: Base, index: int, is_t5: bool) -> list[str]:
    own = [base.kind.text_prefixes[index]] if index < len(base.kind.text_prefixes) else []
    if index == 0:
        return [*own, "lora_te", "lora_te1"]
    if is_t5:
        return [*own, f"lora_te{index + 1}", "lora_te3"]  # OneTrainer counts, sd-scripts says te3
    return [*own, f"lora_te{index + 1}"]


def kohya_modules(base: Base) -> dict[str, Alias]:
    """The names that sd-scripts gives the modules of this base: the ones to write."""
    names: dict[str, Alias] = {}
    if base.kind.native:
        for name, alias in native_aliases(base).items():
            names["lora_unet_" + name.replace(".", "_")] = alias
    for site in base.shapes:
        component, _, path = site.partition(".")
        index = text_component(site)
        if index is not None and index < len(base.kind.text_prefixes):
            name = f"{base.kind.text_prefixes[index]}_{path.replace('.', '_')}"
            names[name] = whole(site, base.shapes)
        elif component == base.denoiser and not base.kind.native:
            names["lora_unet_" + path.replace(".", "_")] = whole(site, base.shapes)
    return names


def unread_by_diffusers(base: Base, sites: Iterable[str], layout: str) -> list[str]:
    """Which of ``sites`` diffusers (0.42) drops or refuses in a file of ours: T5 in any layout, and
    in kohya layout all of SD 3 and what FLUX has outside of its blocks."""
    kind = base.kind.name if layout == "kohya" else ""

    def unread(site: str) -> bool:
        if text_component(site) is not None:
            return kind == "sd3" or ".encoder.block." in site
        return kind == "sd3" or (kind == "flux" and "_blocks." not in site)

    return [site for site in sites if unread(site)]
