"""Nodes that define what to merge: one concept, prompts to preserve, and many LoRAs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, get_args

import folder_paths
from comfy_api.latest import io

from ..iteris_core.concepts import PRESERVE_WEIGHT, Concept, PromptKind, lines_of
from ..iteris_core.errors import IterisError
from .before_merge import about_loras
from .comfy_runtime import show_text
from .concept_specs import (
    ALWAYS,
    AUTO,
    KINDS,
    Kind,
    fingerprint,
    lora_path,
    make_spec,
    phrases_in,
    specs_of,
)
from .schema import (
    NONE,
    advanced,
    concepts_input,
    schema,
    strength_input,
    weight_input,
)

ROWS = 10
"""Number of LoRAs on one node; the front end shows those in use and one more (web/iteris.js)."""

NEED_CONCEPTS = frozenset(
    ("IterisMerge", "IterisMergeExperts", "IterisCompareMerges", "IterisInspectLoras",
     "IterisResizeLora")
)  # fmt: skip
"""Nodes for which an empty list is a mistake."""
_SOURCES = {"you": "", "file": " (from the file)", "captions": " (a guess from its captions)"}


def _loras() -> list[str]:
    return [NONE, *folder_paths.get_filename_list("loras")]


class IterisConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        kinds = [AUTO, *get_args(PromptKind), ALWAYS]
        embeddings = [NONE, *folder_paths.get_filename_list("embeddings")]
        return schema(
            "IterisConcept",
            ["lora", "load lora", "merge lora", "concept"],
            inputs=[
                io.Combo.Input("lora_name", options=_loras(), default=NONE),
                io.String.Input("trigger", default=""),
                io.String.Input("class_word", default=""),
                strength_input("strength"),
                weight_input(),
                io.String.Input("prompts", default="", multiline=True),
                advanced(io.Combo.Input("embedding", options=embeddings, default=NONE)),
                # Optional and last, so that older saved graphs keep the positions of their values.
                strength_input("strength_clip", optional=True),
                advanced(io.Combo.Input("lora_low", options=_loras(), default=NONE, optional=True)),
                io.Combo.Input("kind", options=kinds, default=AUTO, optional=True),
                concepts_input(optional=True),
            ],
            group="concepts",
            outputs=("concepts",),
        )

    @classmethod
    def execute(
        cls,
        lora_name: str,
        trigger: str,
        class_word: str,
        strength: float,
        weight: float,
        prompts: str,
        embedding: str,
        strength_clip: float | None = None,
        lora_low: str = NONE,
        kind: Kind = AUTO,
        concepts: Any = (),
    ) -> io.NodeOutput:
        if lora_name == NONE:
            raise IterisError("IterIS Concept has no LoRA; choose one as lora_name.")
        spec = make_spec(
            lora_path(lora_name),
            trigger=trigger.strip(),
            class_word=class_word.strip(),
            prompts=prompts,
            strength=strength,
            text_strength=strength_clip,
            weight=weight,
            low=None if lora_low == NONE else lora_path(lora_low),
            # Prompts refer to it by its path below models/embeddings.
            embedding="" if embedding == NONE else Path(embedding).with_suffix("").as_posix(),
            kind=kind,
        )
        return io.NodeOutput((*specs_of(concepts), spec))

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, lora_low: str = NONE, **_: Any) -> Any:
        return [fingerprint(name) for name in (lora_name, lora_low)]

    @classmethod
    def validate_inputs(cls, lora_name: Any = NONE, lora_low: Any = NONE) -> bool:
        """A file may be spelled otherwise than in the list; a missing one is found when it runs."""
        return True


_PRESERVED = "a photo of a person\na landscape\na city street"


class PreservePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisPreservePrompts",
            ["regularization", "preservation"],
            inputs=[
                io.String.Input("prompts", default=_PRESERVED, multiline=True),
                weight_input(default=PRESERVE_WEIGHT),
                concepts_input(optional=True),
            ],
            group="concepts",
            outputs=("concepts",),
        )

    @classmethod
    def execute(cls, prompts: str, weight: float, concepts: Any = ()) -> io.NodeOutput:
        lines = lines_of(prompts)
        if not lines:
            raise IterisError("Preserve Prompts is empty; write one prompt per line.")
        spec = Concept.preserve(lines, weight)
        return io.NodeOutput((*specs_of(concepts), spec))


def _named(number: int, what: str) -> dict[str, Any]:
    return {"display_name": f"{number} {what}", "optional": True}


def _row(number: int) -> list[Any]:
    named = partial(_named, number)
    return [
        io.Combo.Input(f"lora_{number}", options=_loras(), default=NONE, **named("LoRA")),
        io.Boolean.Input(
            f"on_{number}", default=True, label_on="on", label_off="off", **named("on")
        ),
        strength_input(f"strength_{number}", **named("strength")),
        strength_input(f"clip_{number}", **named("clip strength")),
        weight_input(f"weight_{number}", **named("weight")),
        io.Combo.Input(f"prompts_{number}", options=list(KINDS), default=AUTO, **named("prompts")),
        io.String.Input(f"words_{number}", default="", **named("words")),
    ]


class IterisLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisLoras",
            ["lora stack", "power lora loader", "multi lora", "lora merger", "load loras"],
            inputs=[
                *(part for number in range(1, ROWS + 1) for part in _row(number)),
                io.String.Input("lines", default="", multiline=True, optional=True),
                # After all others, so that older saved graphs keep the positions of their values.
                *(
                    io.String.Input(f"blocks_{number}", default="", **_named(number, "blocks"))
                    for number in range(1, ROWS + 1)
                ),
                concepts_input(optional=True),
            ],
            outputs=("concepts", "trigger_words"),
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(cls, lines: str = "", concepts: Any = (), **rows: Any) -> io.NodeOutput:
        of_rows = (_spec(number, lines, rows) for number in range(1, ROWS + 1))
        specs = [*specs_of(concepts), *filter(None, of_rows)]
        told = [*map(_line, specs), *about_loras(specs).values()]
        show_text("\n".join(told) or "No LoRA is on.", cls.hidden.unique_id)
        if not specs and _feeds_a_merge(cls.hidden):
            raise IterisError(_nothing_on(rows))
        phrases = [phrase for spec in specs if spec.file is not None for phrase in spec.phrases]
        return io.NodeOutput(tuple(specs), ", ".join(dict.fromkeys(phrases)))

    @classmethod
    def fingerprint_inputs(cls, **values: Any) -> Any:
        return [fingerprint(values.get(f"lora_{number}")) for number in range(1, ROWS + 1)]

    @classmethod
    def validate_inputs(cls, **_: Any) -> bool:
        """A row that is off may name a file that is gone. What is wrong with the others is found
        when it runs: here ComfyUI would repeat it for each of the 83 inputs."""
        return True


def _nothing_on(rows: dict[str, Any]) -> str:
    off = [n for n in range(1, ROWS + 1) if rows.get(f"lora_{n}", NONE) not in (None, NONE)]
    if not off:
        return "IterIS LoRAs is empty. Press + LoRA, and choose at least one."
    which = f"rows {off[0]} to {off[-1]} are" if len(off) > 1 else f"row {off[0]} is"
    return f"No LoRA is on: {which} off. Press the switch before a name to turn its row on."


def _feeds_a_merge(hidden: Any) -> bool:
    """True if its concepts go straight into a node that cannot do without."""
    ours = [hidden.unique_id, 0]
    return any(
        node.get("class_type") in NEED_CONCEPTS and node.get("inputs", {}).get("concepts") == ours
        for node in (hidden.prompt or {}).values()
    )


def _spec(number: int, lines: str, rows: dict[str, Any]) -> Concept | None:
    try:
        return _spec_of(number, lines, rows)
    except IterisError as error:
        error.args = (f"Row {number}: {error}",)
        raise


def _spec_of(number: int, lines: str, rows: dict[str, Any]) -> Concept | None:
    def value(name: str, default: Any) -> Any:
        return rows.get(f"{name}_{number}", default)

    name, kind = value("lora", NONE), value("prompts", AUTO)
    if name in (None, NONE) or not value("on", True):
        return None
    if kind == "lines" and not lines.strip():
        raise IterisError(
            f"the prompts of {name} are set to lines, but lines is empty; write one prompt per "
            "line there, or choose another kind of prompts."
        )
    return make_spec(
        lora_path(name),
        prompts=lines if kind == "lines" else "",
        strength=value("strength", 1.0),
        text_strength=value("clip", 1.0),
        weight=value("weight", 1.0),
        kind=kind,
        phrases=phrases_in(value("words", "")),
        blocks=value("blocks", "").strip(),
        row=number,
    )


def _line(spec: Concept) -> str:
    """The line for a concept on the node."""
    if spec.file is None:
        return "base: unchanged"
    if spec.always_on != "no":
        return f"{spec.file.stem} at {spec.strength:g}: always on, part of the merged LoRA"
    words = "; ".join(spec.phrases) or "no words: it acts on every prompt"
    clip = spec.strength if spec.text_strength is None else spec.text_strength
    strengths = f"{spec.strength:g}" if clip == spec.strength else f"{spec.strength:g}/{clip:g}"
    source = _SOURCES.get(spec.source, f" (from {spec.source})") if spec.phrases else ""
    kind = "" if spec.kind == "subject" else f", {spec.kind}"
    return f"{spec.file.stem} at {strengths}: {words}{source}{kind}"
