"""What Inspect LoRAs says of one LoRA: its information, also where it does not fit the MODEL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..iteris_core.concepts import Concept
from ..iteris_core.config import read_concept
from ..iteris_core.errors import IterisError
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions, read_for_released, read_header
from ..iteris_core.lora_files.metadata import public_name
from ..iteris_core.lora_files.tensors import kinds_of
from ..iteris_core.report.inspection import LoraFacts, describe
from .concept_specs import rows_of
from .schema import discreetly

_TRAINED_ON = ("ss_sd_model_name", "ss_base_model_version")
_SOURCES = {"you": "typed", "file": "from the file", "captions": "a guess from its captions"}


@dataclass(frozen=True)
class Inspected:
    """A LoRA's ``concept`` on the MODEL or, without one, on the released model for which it was
    made. The ``refusal`` says why there is none."""

    concept: Concept
    information: str
    refusal: str = ""


def inspected(spec: Concept, host: Any) -> Inspected:
    """The LoRA in the file of ``spec``."""
    options = ReadOptions(allow_partial=True)
    try:
        concept = read_concept(spec, host, options)
    except IterisError as error:
        rows = rows_of([spec])
        said = discreetly(error)
        refusal = f"{rows.capitalize()}: {said}" if rows else said
        return Inspected(spec, _information(spec, _elsewhere(spec)), refusal)
    return Inspected(concept, _information(concept, concept.lora))


def _elsewhere(spec: Concept) -> Lora | None:
    """The LoRA on the released model for which it was made, if that is known."""
    assert spec.file is not None
    try:
        return read_for_released(spec.file, ReadOptions(allow_partial=True))
    except (ImportError, IterisError):
        return None


def _information(concept: Concept, lora: Lora | None) -> str:
    file, metadata, keys = concept.file, dict[str, str](), list[str]()
    assert file is not None
    size = f"{file.stat().st_size / 2**20:.1f} MiB" if file.exists() else ""
    try:
        shapes, metadata = read_header(file)
        keys = list(shapes)
    except IterisError:  # no LoRA
        pass
    facts = None if lora is None else describe(lora)
    trained = dict.fromkeys(public_name(metadata[key]) for key in _TRAINED_ON if metadata.get(key))
    source = _SOURCES.get(concept.source, f"from {concept.source}" if concept.source else "")
    words = "; ".join(concept.phrases)
    always = ", always on" if concept.always_on != "no" else ""
    parts = [
        "for an unknown base" if facts is None else f"for {facts.base}",
        ", ".join(kinds_of(keys)),
        *([] if facts is None else _ranks(facts)),
        size,
        f"trained on {', '.join(trained)}" if trained else "",
        f"words: {words}{f' ({source})' if source else ''}" if words else "no words",
        f"prompts: {concept.kind}{always}",
        f"licence: {metadata['modelspec.license']}" if metadata.get("modelspec.license") else "",
    ]
    rows = rows_of([concept])
    return f"{file.name}{f' ({rows})' if rows else ''}: {'; '.join(filter(None, parts))}"


def _ranks(facts: LoraFacts) -> list[str]:
    return [f"rank {_counted(facts.ranks)}", f"alpha {_counted(facts.alphas)}"]


def _counted(counts: Mapping[Any, int]) -> str:
    """The values, the most frequent first."""
    order: Iterable[Any] = sorted(counts, key=lambda value: -counts[value])
    return "/".join(map(str, order))
