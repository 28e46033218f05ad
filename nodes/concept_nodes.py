"""Nodes that define what to merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from comfy_api.latest import io

from ..iteris_core.concepts import PRESERVE_WEIGHT, PromptKind, lines_of
from ..iteris_core.config import ConceptConfig
from ..iteris_core.errors import IterisError
from .concept_specs import ALWAYS, Kind, changed, make_spec
from .lora_stacks import lora_path, specs_of
from .schema import (
    NONE,
    advanced,
    concepts_input,
    file_input,
    schema,
    strength_input,
    weight_input,
)


class IterisConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisConcept",
            ["lora", "load lora", "merge lora", "concept"],
            inputs=[
                file_input("lora_name", "loras"),
                io.String.Input("trigger", default=""),
                io.String.Input("class_word", default=""),
                strength_input("strength"),
                weight_input(),
                io.String.Input("prompts", default="", multiline=True),
                advanced(file_input("embedding", "embeddings")),
                # Optional and last, so that older saved graphs keep the positions of their values.
                strength_input("strength_clip", optional=True),
                advanced(file_input("lora_low", "loras", optional=True)),
                io.Combo.Input(
                    "kind",
                    options=[*get_args(PromptKind), ALWAYS],
                    default="subject",
                    optional=True,
                ),
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
        kind: Kind = "subject",
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
        files = [name for name in (lora_name, lora_low) if name not in (None, NONE)]
        return [changed(lora_path(name)) for name in files]


class PreservePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisPreservePrompts",
            ["regularization", "preservation"],
            inputs=[
                io.String.Input(
                    "prompts",
                    default="a photo of a person\na landscape\na city street",
                    multiline=True,
                ),
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
        spec = ConceptConfig.preserve(lines, weight)
        return io.NodeOutput((*specs_of(concepts), spec))
