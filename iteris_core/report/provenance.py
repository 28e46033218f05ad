"""What a merged file says about itself: where it comes from, and how to make it again."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

from torch import Tensor

from ..concepts import Concept
from ..linalg.lowrank import at_rank
from ..lora import Lora
from ..lora_files.metadata import merge_tag_frequency, parse_object
from ..lora_files.purposes import Purpose, purpose_of
from .report import MergeReport

_NO_CONCEPT: Mapping[Purpose, str] = {
    "speed": "makes the base draw in few steps",
    "edit": "makes the base edit pictures",
}
_PACKAGES = ("comfyui-iteris", "torch", "diffusers", "transformers", "peft", "safetensors")


def merge_metadata(concepts: Sequence[Concept], report: MergeReport) -> dict[str, str]:
    """``iteris`` (JSON: versions, method, settings, calibration, concepts with input hashes),
    ``modelspec.*`` and the merged ``ss_*`` of the inputs."""
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    names = [lora.name for lora in loras]
    phrases = [
        phrase
        for concept in concepts
        if concept.lora and (concept.trigger or concept.subjects)
        for phrase in concept.phrases
    ]
    found = {
        "iteris": json.dumps(recipe(concepts, report)),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": " + ".join(names),
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        "modelspec.merged_from": ", ".join(names),
        "modelspec.description": f"Merged by IterIS ({report.method}).",
    }
    if phrases:
        found["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(phrases))
    base = next((lora.base for lora in loras if lora.base is not None), None)
    if base is not None and base.architecture.version:
        found["modelspec.architecture"] = f"{base.architecture.modelspec}/lora"
        found["ss_base_model_version"] = base.architecture.version
    tags = merge_tag_frequency([lora.metadata for lora in loras])
    if tags:
        found["ss_tag_frequency"] = json.dumps(tags)
    return found


def recipe(concepts: Sequence[Concept], report: MergeReport) -> dict[str, object]:
    """Everything that ``iteris merge --from`` needs to run the same merge again."""
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "method": report.method,
        "settings": report.settings,
        "calibration": report.calibration,
        "concepts": [
            {
                "lora": concept.lora.name if concept.lora else None,
                "file": concept.lora.source if concept.lora else None,
                "sha256": concept.lora.sha256 if concept.lora else None,
                "reading": dict(concept.lora.reading) if concept.lora else {},
                "trigger": concept.trigger,
                "class": concept.class_word,
                "prompts": None if concept.prompts is None else list(concept.prompts),
                "subjects": list(concept.subjects),
                "strength": concept.strength,
                "text_strength": concept.text_strength,
                "weight": concept.weight,
            }
            for concept in concepts
        ],
        "notes": report.notes,
    }


def is_ordered(report: MergeReport) -> bool:
    """Whether the merged components stand in the order of their output energy."""
    return report.settings.get("objective") == "output" and not report.settings.get("polish_steps")


def cut_lora(lora: Lora, rank: int, *, ordered: bool) -> Lora:
    """``lora`` with no site above ``rank``, and with metadata that say so; ``ordered`` as in
    :func:`..linalg.lowrank.at_rank`."""
    sites = {site: at_rank(change, rank, ordered=ordered) for site, change in lora.sites.items()}
    return replace(lora, sites=sites, metadata=with_cut(lora.metadata, rank, ordered=ordered))


def with_cut(metadata: Mapping[str, str], rank: int, *, ordered: bool) -> dict[str, str]:
    """The metadata of a merged LoRA with the cut to ``rank`` in its recipe."""
    recipe = parse_object(metadata.get("iteris"))
    if not recipe:
        return dict(metadata)
    cut = {"rank": rank, "ordered": ordered}
    return {**metadata, "iteris": json.dumps({**recipe, "cut": cut})}


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def notes_of(concepts: Sequence[Concept]) -> dict[str, list[str]]:
    """What is to be said about each concept: of its file, and of names that it shares."""
    notes: dict[str, list[str]] = {}
    words = [_words(concept) for concept in concepts]
    shared = Counter(word for own in words for word in own)
    for concept, own in zip(concepts, words, strict=True):
        found = list(concept.lora.notes) if concept.lora is not None else []
        found += _of_the_base(concept)
        found += [
            f"the trigger {word!r} also calls for another of the concepts: one prompt cannot tell "
            "them apart. Give other class words, or train one of them with another trigger"
            for word in sorted(own)
            if shared[word] > 1
        ]
        if found:
            notes.setdefault(concept.name, []).extend(found)
    return notes


def _of_the_base(concept: Concept) -> list[str]:
    """A LoRA that is no concept; one that is a merge itself may have such a name among others."""
    lora = concept.lora
    if lora is None or "iteris" in lora.metadata:
        return []
    purpose = purpose_of(lora.source or lora.name, lora.metadata)
    if purpose is None:
        return []
    return [
        f"by its name this LoRA {_NO_CONCEPT[purpose]}; it is no concept then, and belongs on the "
        "base before the merge (diffusers: load and fuse it; ComfyUI: Load LoRA on MODEL), where "
        "all concepts are merged for it"
    ]


def _words(concept: Concept) -> set[str]:
    """Each trigger, and its first word: ``sks dog`` and ``sks cat`` share a token."""
    if concept.lora is None:
        return set()
    triggers = {" ".join(text.lower().split()) for text in concept.subjects or [concept.trigger]}
    return {word for text in triggers for word in (text, text.partition(" ")[0])} - {""}


def join_embeddings(loras: Sequence[Lora]) -> tuple[dict[str, Mapping[str, Tensor]], list[str]]:
    """All embeddings, and warnings; a name that is taken gets the LoRA's name in front."""
    joined: dict[str, Mapping[str, Tensor]] = {}
    warnings: list[str] = []
    for index, lora in enumerate(loras):
        for name, parts in lora.embeddings.items():
            own = name
            if own in joined:
                own = f"{lora.name or index + 1}-{name}"
                while own in joined:
                    own += "-2"
                warnings.append(
                    f"two LoRAs bring an embedding {name!r}; that of {lora.name} is saved as "
                    f"{own!r}. To choose the name: --rename {lora.name}:{name}=NEW"
                )
            joined[own] = parts
    return joined, warnings
