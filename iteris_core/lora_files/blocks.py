"""Selects a part of a LoRA: weights by block, and layer filters by name.

Blocks and weight lists are those of sd-webui-lora-block-weight ("lbw"): the blocks of the original
code, with BASE for the text encoders. As there, a block without a number in the list gets 0, and
layers in no block (the time embedding, the last layer) stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from ..architectures.record import BaseModel, text_component, whole
from ..errors import ConceptError, LoraFileError
from ..lora import Lora, LowRank


def _range(prefix: str, start: int, stop: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{number:02}" for number in range(start, stop))


LISTS: Mapping[int, tuple[str, ...]] = {
    12: ("BASE", "IN04", "IN05", "IN07", "IN08", "M00", *_range("OUT", 0, 6)),
    17: ("BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", *_range("OUT", 3, 12)),
    20: ("BASE", *_range("IN", 0, 9), "M00", *_range("OUT", 0, 9)),
    26: ("BASE", *_range("IN", 0, 12), "M00", *_range("OUT", 0, 12)),
    61: ("CLIP", "T5", "IN", *_range("D", 0, 19), *_range("S", 0, 38), "OUT"),
}
"""Number of weights → their blocks: SDXL's attention, SD's, all of SDXL, all of SD, FLUX.1"""
_ALL = "1," * 16 + "1"
PRESETS: Mapping[str, str] = {
    "NONE": _ALL.replace("1", "0"),
    "ALL": _ALL,
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
    "ALL0.5": _ALL.replace("1", "0.5"),
}
_SIDES = {"input": "IN", "output": "OUT", "double": "D", "single": "S", "middle": "M"}
_BLOCK = re.compile(r"(input|output|double|single|middle)_blocks?\.(\d+)\.")


def weights_by_block(text: str) -> dict[str, float]:
    """Block → weight, from comma-separated numbers or a list's name; else :class:`ConceptError`."""
    numbers = PRESETS.get(text.strip(), text).split(",")
    try:
        weights = [float(number) for number in numbers]
    except ValueError:
        raise ConceptError(
            f"blocks={text!r} is neither a list of numbers such as 1,0,0.5 nor one of "
            f"{', '.join(PRESETS)}."
        ) from None
    if len(weights) not in LISTS:
        raise ConceptError(
            f"blocks={text!r} has {len(weights)} weights; Stable Diffusion has 17 (26 with "
            "convolutions), SDXL 12 (20), FLUX.1 61."
        )
    return dict(zip(LISTS[len(weights)], weights, strict=True))


def blocks_of(base: BaseModel) -> dict[str, str]:
    """Site → its block, for sites in one; empty for an architecture without such names."""
    # Without a table, as in ComfyUI, sites already have the original names.
    denoiser = [site for site in base.shapes if text_component(site) is None]
    names = base.architecture.original_names(base.shapes) or {
        site.partition(".")[2]: whole(site, base.shapes) for site in denoiser
    }
    unet = any(name.startswith("middle_block.") for name in names)
    blocks: dict[str, str] = {}
    for name, alias in names.items():
        if numbered := _BLOCK.match(name):
            number = 0 if numbered[1] == "middle" else int(numbered[2])
            block = f"{_SIDES[numbered[1]]}{number:02}"
        elif not unet and ("_in." in f"{name}." or name.startswith("final_layer.")):
            block = "OUT" if name.startswith("final_layer.") else "IN"
        else:
            continue
        blocks |= {piece.site: block for piece in alias}
    if not {"M00", "S00"} & set(blocks.values()):
        return {}
    for site in base.shapes:
        encoder = text_component(site)
        if encoder is not None:
            blocks[site] = "BASE" if unet else ("CLIP", "T5")[min(encoder, 1)]
    return blocks


def filtered(lora: Lora, blocks: str = "", layers: str = "") -> Lora:
    """``lora`` with its changes multiplied by the weights of ``blocks`` (empty: unchanged), and
    restricted to ``layers``: comma-separated patterns of site names with ``*``; a ``-`` before a
    pattern drops its layers. Raises :class:`ConceptError` for invalid text, and
    :class:`LoraFileError`, naming the LoRA, if nothing is left or its architecture has no such
    blocks."""
    if not blocks and not layers:
        return lora
    weights = _weights(lora, blocks) if blocks else {}
    patterns = check_layers(layers) if layers else []
    selected = {site for site in lora.sites if not any(keep for keep, _ in patterns)}
    for keep, pattern in sorted(patterns, reverse=True):
        matching = {site for site in lora.sites if fnmatchcase(site, pattern)}
        if not matching:
            raise LoraFileError(
                f"{lora.name}: no layer name matches {pattern!r}; one name is {min(lora.sites)}."
            )
        selected = selected | matching if keep else selected - matching
    sites: dict[str, LowRank] = {}
    for site, change in lora.sites.items():
        factor = weights.get(site, 1.0)
        if site in selected and factor:
            sites[site] = replace(change.scaled(factor), scale=change.scale * factor)
    if not sites:
        raise LoraFileError(f"{lora.name}: its blocks and layers leave nothing of it.")
    note = f"{len(sites)} of {len(lora.sites)} layers, by its blocks and layers"
    texts = {name: text for name, text in (("blocks", blocks), ("layers", layers)) if text}
    reading = {**lora.reading, **texts}
    return replace(lora, sites=sites, notes=[*lora.notes, note], reading=reading)


def check_layers(text: str) -> list[tuple[bool, str]]:
    """(keep, pattern) for each pattern; raises :class:`ConceptError` for an empty one."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.removeprefix("-") for part in parts):
        raise ConceptError(
            f"layers={text!r} has an empty pattern; write for example *attn2*,-*ff*."
        )
    return [(not part.startswith("-"), part.removeprefix("-")) for part in parts]


def _weights(lora: Lora, blocks: str) -> dict[str, float]:
    weights = weights_by_block(blocks)
    places = blocks_of(lora.base) if lora.base is not None else {}
    unet = "M00" in places.values()
    unlike = {"CLIP", "D00"} if unet else {"M00"}
    more = set() if unet else set(places.values()) - weights.keys()  # of a larger transformer
    if not places or unlike & weights.keys() or more:
        title = "its base" if lora.base is None else lora.base.architecture.title
        raise LoraFileError(
            f"{lora.name}: {title} has no blocks for {len(weights)} weights. Stable Diffusion has "
            "17 or 26, SDXL 12 or 20, FLUX.1 61; for others select layers by name (layers=)."
        )
    return {site: weights.get(block, 0.0) for site, block in places.items()}
