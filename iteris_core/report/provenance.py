"""Metadata of a merged file: its origin, and the recipe to repeat the merge."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from ..concepts import Concept, Phrased
from ..config import ConceptConfig, MergeConfig
from ..hosts.learned import EmbeddingTriggers
from ..linalg.lowrank import at_rank
from ..lora import Lora
from ..lora_files.metadata import (
    Purpose,
    merge_tag_frequency,
    parse_object,
    parted,
    public_name,
    purpose_of,
)
from .report import MergeReport

_NO_CONCEPT: Mapping[Purpose, str] = {
    "speed": "makes the base draw in few steps",
    "edit": "makes the base edit pictures",
}
_PACKAGES = ("iteris-lora", "torch", "diffusers", "transformers", "peft", "safetensors")


def merge_metadata(
    concepts: Sequence[Concept],
    report: MergeReport,
    joined: Joined,
    calls: Sequence[EmbeddingTriggers],
) -> dict[str, str]:
    """``iteris`` (JSON: versions, method, settings, calibration, concepts with input hashes, names
    of embeddings), ``modelspec.*`` including the inputs' licences, and the merged ``ss_*`` of the
    inputs, with the base's name if they agree on it. Phrases use the embeddings' names in the
    merged LoRA."""
    inside = [concept for concept in concepts if concept.always_on != "outside"]
    loras = [concept.lora for concept in inside if concept.lora is not None]
    names = [lora.name for lora in loras]
    called = [
        [of_one.renamed(phrase, names_of) for phrase in concept.phrases]
        for concept, of_one, names_of in zip(concepts, calls, joined.names, strict=True)
    ]
    phrases = [
        phrase
        for concept, phrases_of in zip(concepts, called, strict=True)
        if concept.lora and concept.always_on == "no" and (concept.trigger or concept.subjects)
        for phrase in phrases_of
    ]
    metadata = {
        "iteris": json.dumps(
            {**recipe(concepts, report, called), "embeddings": list(joined.embeddings)}
        ),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": " + ".join(names),
        "modelspec.date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "modelspec.merged_from": ", ".join(names),
        "modelspec.description": f"Merged by IterIS ({report.method}).",
    }
    if phrases:
        metadata["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(phrases))
    if report.strengths:
        metadata |= _limits(*report.strengths)
    named = [(lora.name, lora.metadata.get("modelspec.license", "").strip()) for lora in loras]
    if licences := [f"{name}: {licence}" for name, licence in named if licence]:
        metadata["modelspec.license"] = "; ".join(licences)
    base = next((lora.base for lora in loras if lora.base is not None), None)
    if base is not None and base.architecture.version:
        metadata["modelspec.architecture"] = f"{base.architecture.modelspec}/lora"
        metadata["ss_base_model_version"] = base.architecture.version
    bases = {public_name(lora.metadata.get("ss_sd_model_name", "")) for lora in loras}
    if len(bases) == 1 and (name := bases.pop()):
        metadata["ss_sd_model_name"] = name
    tags = merge_tag_frequency([lora.metadata for lora in loras])
    if tags:
        metadata["ss_tag_frequency"] = json.dumps(tags)
    return metadata


def recipe(
    concepts: Sequence[Concept], report: MergeReport, called: Sequence[Sequence[str]]
) -> dict[str, object]:
    """Everything that ``iteris merge --from`` needs to repeat the merge, and each concept's trigger
    phrases (``called``) in the result."""
    config = MergeConfig(
        concepts=tuple(ConceptConfig.of(concept) for concept in concepts),
        method=report.method,
        settings=report.settings,
        calibration=report.calibration,
    )
    recorded = config.to_dict()
    entries = [
        {"lora": concept.lora.name if concept.lora else None, **entry, "called": list(phrases)}
        for concept, entry, phrases in zip(concepts, recorded["concepts"], called, strict=True)
    ]
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"versions": versions, **recorded, "concepts": entries, "notes": report.notes}


def is_ordered(report: MergeReport) -> bool:
    """True if the merged components are sorted by output energy."""
    settings = report.settings
    return settings.get("objective") == "output" and not settings.get("block_steps")


def with_recipe(lora: Lora, **more: Any) -> Lora:
    """``lora`` with ``more`` added to its recipe, if it has one."""
    recipe = parse_object(lora.metadata.get("iteris"))
    if not recipe:
        return lora
    return replace(lora, metadata={**lora.metadata, "iteris": json.dumps({**recipe, **more})})


def with_run(lora: Lora, base: str, unmergeable: str) -> Lora:
    """``lora`` with its base in the recipe: a hub name, or the last part of a path, because no
    local path goes into a file."""
    return with_recipe(lora, base=public_name(base), unmergeable=unmergeable)


def cut_lora(lora: Lora, rank: int, *, ordered: bool) -> Lora:
    """``lora`` with every site cut to ``rank``, recorded in its recipe; ``ordered`` as in
    :func:`..linalg.lowrank.at_rank`."""
    sites = {site: at_rank(change, rank, ordered=ordered) for site, change in lora.sites.items()}
    return with_recipe(replace(lora, sites=sites), cut={"rank": rank, "ordered": ordered})


def scaled_lora(lora: Lora, strength: float) -> Lora:
    """``lora`` with its changes multiplied by ``strength``, recorded in its recipe."""
    if strength == 1:
        return lora
    sites = {site: change.scaled(strength) for site, change in lora.sites.items()}
    metadata = dict(lora.metadata)
    if strength > 0 and "strength_min" in metadata:
        low, high = (float(metadata[name]) for name in ("strength_min", "strength_max"))
        metadata |= _limits(low / strength, high / strength)
    return with_recipe(replace(lora, sites=sites, metadata=metadata), strength=strength)


def _limits(low: float, high: float) -> dict[str, str]:
    shown = f"{low:.3g}", f"{high:.3g}"
    hint = f"Load it at a strength from {shown[0]} to {shown[1]}."
    return {"strength_min": shown[0], "strength_max": shown[1], "modelspec.usage_hint": hint}


def notes_of(concepts: Sequence[Concept]) -> dict[str, list[str]]:
    """Notes on each concept by name: about its file, and about triggers that it shares."""
    notes: dict[str, list[str]] = {}
    for concept, shared in zip(concepts, shared_triggers(concepts), strict=True):
        of_file = list(concept.lora.notes) if concept.lora is not None else []
        if notes_of_one := [*of_file, *_of_the_base(concept), *shared]:
            notes.setdefault(concept.name, []).extend(notes_of_one)
    return notes


def lacks_of(concepts: Sequence[Concept]) -> list[str]:
    """The parts of the concepts' LoRAs that are not in a merge."""
    lacks: list[str] = []
    for concept in concepts:
        lora = concept.lora
        if lora is None:
            continue
        if lora.left_out:
            lacks.append(f"{lora.left_out} tensors of {concept.name}")
        if not any(change.squared_norm() for change in lora.sites.values()):
            lacks.append(f"all of {concept.name}, whose LoRA changes nothing")
    return lacks


def shared_triggers(concepts: Sequence[Phrased]) -> list[list[str]]:
    """For each concept, a sentence about each earlier one that prompts for either invoke too."""
    return [
        [told for other in concepts[:at] if (told := _clash(other, concept))]
        for at, concept in enumerate(concepts)
    ]


def _clash(one: Phrased, two: Phrased) -> str:
    if one.preserves or two.preserves:
        return ""
    for concept, other in ((one, two), (two, one)):
        triggers = _triggers(concept)
        for phrase in map(_in_lower_case, other.phrases):
            if within := [word for word in triggers if f" {word} " in f" {phrase} "]:
                return (
                    f"{max(within, key=len)!r} is the trigger of one concept and part of "
                    f"{phrase!r}, which invokes another: a prompt for that one invokes both. Give "
                    "one of them other words, or train it with another trigger"
                )
    return ""


def _triggers(concept: Phrased) -> set[str]:
    """In lower case, whole and by the word that is not common: "sks dog" and "sks cat" share it."""
    texts = map(_in_lower_case, [concept.trigger] if concept.trigger else concept.subjects)
    return {word for text in texts for word in (text, parted(text)[1])} - {""}


def _in_lower_case(text: str) -> str:
    return " ".join(text.lower().split())


def _of_the_base(concept: Concept) -> list[str]:
    """A note on a LoRA that is not a concept; a merged LoRA may contain such a name among
    others."""
    lora = concept.lora
    if lora is None or concept.always_on != "no" or "iteris" in lora.metadata:
        return []
    purpose = purpose_of(lora.source or lora.name, lora.metadata)
    if purpose is None:
        return []
    return [
        f"judging by its name, this LoRA {_NO_CONCEPT[purpose]}. Mark it as always on "
        "(always_on=include): all concepts are then merged with it on, and the file includes it"
    ]


@dataclass(frozen=True)
class Joined:
    """All embeddings of a merged LoRA; ``names`` maps their original names, by concept, to their
    names there."""

    embeddings: Mapping[str, Mapping[str, Tensor]]
    names: Sequence[Mapping[str, str]]
    warnings: Sequence[str]


def join_embeddings(concepts: Sequence[Concept]) -> Joined:
    """Every concept's embeddings combined; a duplicate name is prefixed with the LoRA's name."""
    joined: dict[str, Mapping[str, Tensor]] = {}
    names: list[dict[str, str]] = []
    warnings: list[str] = []
    for index, concept in enumerate(concepts):
        lora, own_names = concept.lora or Lora({}), dict[str, str]()
        for name, parts in lora.embeddings.items():
            joined_name = name
            if joined_name in joined and not _same(parts, joined[joined_name]):
                joined_name = f"{lora.name or index + 1}-{name}"
                while joined_name in joined:
                    joined_name += "-2"
                warnings.append(
                    f"two LoRAs have an embedding {name!r}; the one from {lora.name} is saved as "
                    f"{joined_name!r}"
                )
            joined[joined_name] = parts
            own_names[name] = joined_name
        names.append(own_names)
    return Joined(joined, names, warnings)


def _same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[part], two[part]) for part in one)
