"""Nodes that say what is to be merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import folder_paths
from comfy_api.latest import io

from ..iteris_core.concept_config import ConceptConfig
from ..iteris_core.concepts import PRESERVE_WEIGHT, PromptKind
from ..iteris_core.errors import IterisError
from .concept_specs import ALWAYS, Kind, changed, make_spec, prompt_lines
from .lora_stacks import NONE, lora_path, specs_of
from .schema import (
    LoraStack,
    advanced,
    concepts_input,
    concepts_output,
    schema,
    strength_input,
    weight_input,
)


def _previous() -> Any:
    return concepts_input("Concepts from the node before; this one is added.", optional=True)


class IterisConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisConcept",
            "IterIS Concept",
            ["lora", "load lora", "merge lora", "concept"],
            description="One LoRA and how to call for what it knows; chain one node per LoRA.",
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="The LoRA, from models/loras.",
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip='The word that calls the concept, such as "sks". Leave trigger, class '
                    "word and prompts empty to take them from the file.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    tooltip='What kind of thing it is, such as "cat"; prompts are made from both.',
                ),
                strength_input(
                    "strength", "What you would load this LoRA at; the merged one is used at 1."
                ),
                weight_input("How much this concept counts where concepts disagree."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="Prompts of your own, one a line, used as they are. For a style, or "
                    "where trigger and class word say too little.",
                ),
                *advanced(
                    io.Combo.Input(
                        "embedding",
                        options=[NONE, *folder_paths.get_filename_list("embeddings")],
                        default=NONE,
                        tooltip="A textual inversion that was trained together with the LoRA, from "
                        "models/embeddings; it stands for the trigger. One that comes with the "
                        "LoRA's file is in force anyway.",
                    )
                ),
                # Optional and last: graphs that were saved without it keep their values' places.
                strength_input(
                    "strength_clip",
                    "Strength of what the LoRA changes in the text encoders; 0 leaves it out.",
                    optional=True,
                ),
                *advanced(
                    io.Combo.Input(
                        "lora_low",
                        options=[NONE, *folder_paths.get_filename_list("loras")],
                        default=NONE,
                        optional=True,
                        tooltip="The concept's file for low noise, of models in two parts (Wan 2.2 "
                        "14B); lora_name is the one for high noise. For IterIS Merge Experts.",
                    )
                ),
                io.Combo.Input(
                    "kind",
                    options=[*get_args(PromptKind), ALWAYS],
                    default="subject",
                    optional=True,
                    tooltip="What prompts are made for: a person, animal or thing; a style of "
                    "everything; booru tags; a video. always on: a speed LoRA (turbo, lightning), "
                    "which is on while the others are merged, and part of the merged LoRA.",
                ),
                _previous(),
            ],
            outputs=[concepts_output()],
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
        spec = make_spec(
            lora_path(lora_name),
            trigger=trigger,
            class_word=class_word,
            prompts=prompts,
            strength=strength,
            text_strength=strength_clip,
            weight=weight,
            low=None if lora_low == NONE else lora_path(lora_low),
            # A prompt names it by its path below models/embeddings.
            embedding="" if embedding == NONE else Path(embedding).with_suffix("").as_posix(),
            kind=kind,
        )
        return io.NodeOutput((*specs_of(concepts), spec))

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, lora_low: str = NONE, **_: Any) -> Any:
        files = [name for name in (lora_name, lora_low) if name not in (None, NONE)]
        return [changed(lora_path(name)) for name in files]


class ConceptsFromStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisConceptsFromStack",
            "IterIS Concepts from LoRA Stack",
            ["lora stack", "lora_stack"],
            description="Every LoRA of a stack, with the words that its file knows.",
            inputs=[
                LoraStack.Input(
                    "lora_stack",
                    tooltip="The LoRAs of a LoRA stacker of another pack, with their strengths.",
                ),
                _previous(),
            ],
            outputs=[concepts_output()],
        )

    @classmethod
    def execute(cls, lora_stack: list[Any] | None, concepts: Any = ()) -> io.NodeOutput:
        return io.NodeOutput((*specs_of(concepts), *specs_of(lora_stack)))


class PreservePrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisPreservePrompts",
            "IterIS Preserve Prompts",
            ["regularization", "preservation"],
            description="Prompts on which the base model is to stay as it is.",
            inputs=[
                io.String.Input(
                    "prompts",
                    default="a photo of a person\na landscape\na city street",
                    multiline=True,
                    tooltip="One prompt a line, about things that the LoRAs should leave alone.",
                ),
                weight_input(
                    "How much this counts; much of it weakens the concepts.",
                    default=PRESERVE_WEIGHT,
                ),
                _previous(),
            ],
            outputs=[concepts_output()],
        )

    @classmethod
    def execute(cls, prompts: str, weight: float, concepts: Any = ()) -> io.NodeOutput:
        lines = prompt_lines(prompts)
        if not lines:
            raise IterisError("Preserve Prompts is empty; write one prompt a line.")
        spec = ConceptConfig(None, lines, trigger="preserve", weight=weight)
        return io.NodeOutput((*specs_of(concepts), spec))
