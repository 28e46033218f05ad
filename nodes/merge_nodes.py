"""Nodes that merge: on one model, on two experts, and with several methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files.embeddings import bundled
from ..iteris_core.methods import all_methods, find_method
from ..iteris_core.report.provenance import scaled_lora
from .comfy_host import BOUNDARY
from .comfy_lora import apply_lora
from .comfy_runtime import show_text, ui_text
from .concept_specs import specs_of
from .kept import Merge
from .merge_settings import Request
from .merging import as_lora_model, as_lora_models, merged
from .save_node import how_to_call
from .schema import (
    MERGED,
    beside_inputs,
    method_inputs,
    model_inputs,
    preset_input,
    sampling_inputs,
    schema,
    strength_input,
)


class IterisMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisMerge",
            ["merge loras", "lora merger", "combine loras", "multi concept", "merge styles"],
            inputs=[*model_inputs(), *method_inputs(strength_input("strength", optional=True))],
            outputs=(*MERGED, "trigger_words"),
        )

    @classmethod
    def execute(cls, model: Any, concepts: Any, clip: Any = None, **values: Any) -> io.NodeOutput:
        merge = _merge(cls.hidden, model, clip, concepts, values)
        lora = as_lora_model(merge)
        return _output(cls.hidden, (*apply_lora(model, clip, lora), lora), merge)


class IterisMergeExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        model, clip, concepts = model_inputs()
        return schema(
            "IterisMergeExperts",
            ["wan 2.2 14b", "high noise low noise", "merge wan loras"],
            inputs=[
                model,
                io.Model.Input("model_low"),
                clip,
                concepts,
                io.Float.Input("boundary", default=BOUNDARY, min=0.0, max=1.0, step=0.005),
                *method_inputs(strength_input("strength", optional=True)),
            ],
            outputs=("MODEL", "MODEL low", "CLIP", "lora", "lora low", "report", "trigger_words"),
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        model_low: Any,
        concepts: Any,
        boundary: float,
        clip: Any = None,
        **values: Any,
    ) -> io.NodeOutput:
        experts = {"low": model_low, "boundary": boundary}
        merge = _merge(cls.hidden, model, clip, concepts, values, **experts)
        high, low = as_lora_models(merge)
        model, clip_out = apply_lora(model, clip, high)
        model_low, _ = apply_lora(model_low, clip, low)
        return _output(cls.hidden, (model, model_low, clip_out, high, low), merge)


_EACH = "each strength is a file of its own, unless Save Merged LoRA may overwrite."


def _merge(
    hidden: Any, model: Any, clip: Any, concepts: Any, values: Mapping[str, Any], **experts: Any
) -> Merge:
    """The merge for the inputs' ``values``, at their strength, with the whole report."""
    strength: float = values.get("strength", 1.0)
    request = Request.of(values, model)
    config = request.config(specs_of(concepts), values.get("method", "iteris"))
    merge = merged(model, clip, config, request, hidden.unique_id, **experts)
    scaled = "" if strength == 1 else f"\n  At strength {strength:g}, in the file as well: {_EACH}"
    called = how_to_call(bundled(merge.lora.embeddings))
    if words := _words(merge):
        called = f"\n  Trigger words: {words}{called}"
    report = merge.report + scaled + called
    return replace(merge, lora=scaled_lora(merge.lora, strength), report=report)


def _output(hidden: Any, made: Sequence[Any], merge: Merge) -> io.NodeOutput:
    show_text(merge.report, hidden.unique_id)
    return io.NodeOutput(*made, merge.report, _words(merge), ui=ui_text(merge.report))


def _words(merge: Merge) -> str:
    return merge.lora.metadata.get("modelspec.trigger_phrase", "")


_BASE = "base"


class CompareMerges(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisCompareMerges",
            ["compare lora merges", "xy plot"],
            inputs=[
                *model_inputs(),
                io.String.Input(
                    "methods",
                    default="iteris, average, sum, ties",
                    tooltip="Method names separated by commas "
                    f"({', '.join(method.name for method in all_methods())}); base means "
                    "no LoRA.",
                ),
                *sampling_inputs(),
                preset_input(),
                *beside_inputs(),
            ],
            group="compare",
            outputs=("MODEL", "CLIP", "labels", "report"),
            lists=("MODEL", "CLIP", "labels"),
        )

    @classmethod
    def execute(
        cls, model: Any, concepts: Any, methods: str, clip: Any = None, **values: Any
    ) -> io.NodeOutput:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        if not names:
            raise IterisError("Compare Merges has no methods; enter for example iteris, average.")
        for name in names:
            if name != _BASE:
                find_method(name)
        request = Request.of(values, model)
        node_id, specs = cls.hidden.unique_id, specs_of(concepts)
        models, clips, reports = [], [], []
        for name in names:
            drawn = model, clip
            if name != _BASE:
                merge = merged(model, clip, request.config(specs, name), request, node_id)
                drawn = apply_lora(model, clip, as_lora_model(merge))
                reports.append(merge.report)
            models.append(drawn[0])
            clips.append(drawn[1])
        report = "\n".join(reports)
        show_text(report, node_id)
        return io.NodeOutput(models, clips, names, report, ui=ui_text(report))
