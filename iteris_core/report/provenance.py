"""Metadata of a merged file: its origin, and the recipe to repeat the merge."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..concepts import Concept
from ..config import MergeConfig
from ..hosts.learned import embedding_triggers
from ..linalg import cut_to
from ..lora import Lora
from ..lora_files.metadata import (
    ALWAYS_ON,
    merge_tag_frequency,
    merged_concepts,
    noted_tags,
    parse_object,
    parted,
    public_name,
    purpose_of,
)
from ..passes.report import MergeReport

_TRIGGERS = "trigger words"
"""A folder in ``ss_tag_frequency``, of which managers of LoRAs show the most frequent tags."""
_PACKAGES = ("iteris-lora", "torch", "diffusers", "transformers", "peft", "safetensors")


def merge_metadata(
    concepts: Sequence[Concept],
    report: MergeReport,
    embeddings: Collection[str],
    new_names: Sequence[Mapping[str, str]],
) -> dict[str, str]:
    """``iteris`` (JSON: versions, method, settings, calibration, concepts with input hashes, names
    of ``embeddings``), ``modelspec.*`` including the inputs' licences, and the merged ``ss_*`` of
    the inputs, with the base's name if they agree on it. Phrases use the embeddings' ``new_names``,
    those in the merged LoRA."""
    loras = [c.lora for c in concepts if c.lora is not None and c.always_on != "outside"]
    names = [lora.name for lora in loras]
    called: list[list[str]] = []
    phrases: list[str] = []
    for concept, renamed in zip(concepts, new_names, strict=True):
        triggers = embedding_triggers(concept)
        called.append([triggers.renamed(phrase, renamed) for phrase in concept.phrases])
        if concept.lora and concept.always_on == "no" and (concept.trigger or concept.subjects):
            phrases += called[-1]
    metadata = {
        "iteris": json.dumps({**recipe(concepts, report, called), "embeddings": [*embeddings]}),
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
    tags.pop(_TRIGGERS, None)  # of a source that was merged itself
    if phrases:
        most = sum(max(counts.values(), default=0) for counts in tags.values())
        tags = {_TRIGGERS: dict.fromkeys(phrases, most + 1), **tags}
    if tags:
        metadata["ss_tag_frequency"] = json.dumps(tags)
    return metadata


def recipe(
    concepts: Sequence[Concept], report: MergeReport, called: Sequence[Sequence[str]]
) -> dict[str, object]:
    """What ``iteris merge --from`` needs, and each concept's phrases in the result (``called``)."""
    config = MergeConfig(
        concepts=tuple(concepts),
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
    partial = {"partial": report.partial} if report.partial else {}
    return {"versions": versions, **recorded, **partial, "concepts": entries, "notes": report.notes}


def without_files(metadata: Mapping[str, str]) -> list[str]:
    """The LoRAs of a merged file that were in no file."""
    return [str(c["lora"]) for c in merged_concepts(metadata) if not c.get("file")]


def with_recipe(lora: Lora, **more: Any) -> Lora:
    """``lora`` with ``more`` added to its recipe, if it has one."""
    recipe = parse_object(lora.metadata.get("iteris"))
    if not recipe:
        return lora
    return replace(lora, metadata={**lora.metadata, "iteris": json.dumps({**recipe, **more})})


def with_run(lora: Lora, base: str, unmergeable: str) -> Lora:
    """``lora`` with its base in the recipe, as a name: no local path goes into a file."""
    return with_recipe(lora, base=public_name(base), unmergeable=unmergeable)


def cut_lora(lora: Lora, rank: int, *, ordered: bool) -> Lora:
    """``lora`` with every site cut to ``rank``, recorded in its recipe. With
    ``ordered`` components the first ones are kept. Otherwise an SVD cuts a site."""
    sites = {
        site: replace(change, up=change.up[:, :rank], down=change.down[:rank])
        if ordered
        else cut_to(change, rank)[0]
        for site, change in lora.sites.items()
    }
    return with_recipe(replace(lora, sites=sites), cut={"rank": rank, "ordered": ordered})


def scaled_lora(lora: Lora, strength: float) -> Lora:
    """``lora`` with its changes multiplied by ``strength``, recorded in its recipe."""
    if strength == 1:
        return lora
    sites = {site: replace(c, up=c.up * strength) for site, c in lora.sites.items()}
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
    """Notes on each concept by name: about its file, a purpose other than a concept, and triggers
    that it shares."""
    notes: dict[str, list[str]] = {}
    for concept, shared in zip(concepts, shared_triggers(concepts), strict=True):
        of_file = concept.lora.notes if concept.lora is not None else ()
        if notes_on := [*of_file, *_on_its_purpose(concept), *shared]:
            notes.setdefault(concept.name, []).extend(notes_on)
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


def shared_triggers(concepts: Sequence[Concept]) -> list[list[str]]:
    """For each concept, a sentence about each earlier one that prompts for either invoke too."""
    return [
        [sentence for other in concepts[:at] if (sentence := _clash(other, concept))]
        for at, concept in enumerate(concepts)
    ]


def _clash(first: Concept, second: Concept) -> str:
    if first.preserves or second.preserves:
        return ""
    if first.lora and second.lora and first.lora.sha256 == second.lora.sha256 != "":
        return f"its file is that of {first.name}, too, and so counts twice: leave one of them out"
    ours, theirs = (
        [" ".join(text.lower().split()) for text in concept.phrases] for concept in (first, second)
    )
    if ours and ours == theirs:
        return (
            f"the words {ours[0]!r} are those of {first.name}, too. Versions of one LoRA (epochs, "
            "trainings) become one that fits them all; of two things the merge shows a mixture: "
            "train one of them with another trigger"
        )
    for concept, phrases in ((first, theirs), (second, ours)):
        triggering = [concept.trigger] if concept.trigger else concept.subjects
        texts = [" ".join(text.lower().split()) for text in triggering]
        # Whole, and by the word that is not common: "sks dog" and "sks cat" share it.
        triggers = {word for text in texts for word in (text, parted(text)[1])} - {""}
        for phrase in phrases:
            if within := [word for word in triggers if f" {word} " in f" {phrase} "]:
                return (
                    f"{max(within, key=len)!r} is the trigger of one concept and part of "
                    f"{phrase!r}, which invokes another: a prompt for that one invokes both. Give "
                    "one of them other words, or train it with another trigger"
                )
    return ""


def _on_its_purpose(concept: Concept) -> list[str]:
    """A note on a LoRA that is no subject, or was not taken for one; a merged LoRA may contain such
    a name among others."""
    lora = concept.lora
    if lora is None or "iteris" in lora.metadata:
        return []
    tags = noted_tags(Path(lora.source)) if lora.source else ()
    purpose = purpose_of(lora.source or lora.name, lora.metadata, tags, concept.phrases)
    if purpose is None:
        return []
    seen = f"judging by its name and metadata, the kind of this LoRA is {purpose}"
    if concept.always_on != "no":
        return [seen] if purpose in ALWAYS_ON else []
    if purpose in (*ALWAYS_ON, "edit"):
        return [
            f"{seen}. Mark it as always on (always_on=include): all concepts are then merged with "
            "it on, and the file includes it"
        ]
    return [f"{seen}; prompts for kind={purpose}"] if concept.kind == purpose else []


def join_embeddings(
    concepts: Sequence[Concept],
) -> tuple[dict[str, Mapping[str, Tensor]], list[dict[str, str]], list[str]]:
    """Every concept's embeddings combined; for each concept, their old names → those there; and
    warnings. A duplicate name is prefixed with the LoRA's name."""
    embeddings: dict[str, Mapping[str, Tensor]] = {}
    new_names: list[dict[str, str]] = []
    warnings: list[str] = []
    for index, concept in enumerate(concepts):
        lora = concept.lora or Lora({})
        new_names.append({})
        for name, parts in lora.embeddings.items():
            new_name, known = name, embeddings.get(name)
            if known is not None and not (
                known.keys() == parts.keys()
                and all(torch.equal(known[part], parts[part]) for part in parts)
            ):
                new_name = f"{lora.name or index + 1}-{name}"
                while new_name in embeddings:
                    new_name += "-2"
                warnings.append(
                    f"two LoRAs have an embedding {name!r}; the one from {lora.name} is saved as "
                    f"{new_name!r}"
                )
            embeddings[new_name] = parts
            new_names[-1][name] = new_name
    return embeddings, new_names, warnings
