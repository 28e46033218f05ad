"""Nodes that merge: on one model, on two experts, and with several methods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ..iteris_core.concepts import Concept
from ..iteris_core.config import MergeConfig
from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files.embeddings import bundled
from ..iteris_core.report.provenance import scaled_lora
from .comfy_host import BOUNDARY
from .comfy_lora import apply_lora
from .comfy_runtime import show_text, ui_text
from .concept_specs import specs_of
from .kept import Merge
from .merge_settings import Request
from .merging import as_lora_model, as_lora_models, merged, merged_from_files
from .save_node import how_to_call
from .schema import (
    MERGED,
    METHOD,
    beside_inputs,
    method_inputs,
    method_names,
    minutes_input,
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
            inputs=[
                *model_inputs(needed=False),
                *method_inputs(strength_input("strength", optional=True)),
            ],
            outputs=(*MERGED, "trigger_words", "prompts"),
            lists=("prompts",),
        )

    @classmethod
    def execute(
        cls, model: Any = None, concepts: Any = (), clip: Any = None, **values: Any
    ) -> io.NodeOutput:
        merge = _merge(cls.hidden, model, clip, concepts, values)
        lora = as_lora_model(merge)
        applied = (None, None) if model is None else apply_lora(model, clip, lora)
        return _output(cls.hidden, (*applied, lora), merge, concepts)


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
            outputs=(
                *("MODEL", "MODEL low", "CLIP", "lora", "lora low", "report", "trigger_words"),
                "prompts",
            ),
            lists=("prompts",),
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
        made = model, model_low, clip_out, high, low
        return _output(cls.hidden, made, merge, concepts)


_DETAILS = "  Details: connect the output report to Preview as Text."


def _merge(
    hidden: Any, model: Any, clip: Any, concepts: Any, values: Mapping[str, Any], **experts: Any
) -> Merge:
    """The merge for the inputs' ``values``, at their strength."""
    strength: float = values.get("strength", 1.0)
    request = Request.of(values, model)
    config = request.config(specs_of(concepts), values.get("method", METHOD))
    if model is None:
        merge = merged_from_files(config, hidden.unique_id)
    else:
        merge = merged(model, clip, config, request, hidden.unique_id, **experts)
    scaled = (
        f"\n  At strength {strength:g}, in the file as well: each strength is a file of its own, "
    )
    scaled += "unless Save Merged LoRA may overwrite."
    called = how_to_call(bundled(merge.lora.embeddings))
    if words := _words(merge):
        called = f"\n  Trigger words: {words}{called}"
    headline = merge.headline + (scaled if strength != 1 else "") + called
    return replace(merge, lora=scaled_lora(merge.lora, strength), headline=headline)


def _output(hidden: Any, made: Sequence[Any], merge: Merge, concepts: Any) -> io.NodeOutput:
    shown = f"{merge.headline}\n{_DETAILS}"
    show_text(shown, hidden.unique_id)
    texts = merge.report, _words(merge), prompts_of(specs_of(concepts))
    return io.NodeOutput(*made, *texts, ui={**ui_text(shown), "report": [merge.report]})


def _words(merge: Merge) -> str:
    return merge.lora.metadata.get("modelspec.trigger_phrase", "")


def prompts_of(specs: Sequence[Concept]) -> list[str]:
    """The trigger words of each concept, apart: two that one prompt names would mix. A single style
    goes with every other concept."""
    shown = [spec for spec in specs if spec.is_active and spec.phrases and spec.always_on == "no"]
    styles = [spec.phrases[0] for spec in shown if spec.kind == "style"]
    things = [spec.phrases[0] for spec in shown if spec.kind != "style"]
    if len(styles) == 1 and things:
        return [f"{thing}, {styles[0]}" for thing in things]
    return [*things, *styles] or [""]


_NONE, _BASE, _EACH, _STACKED = "none", "base", "each alone", "stacked"
_SUM = "sum"
_FIRST = (_BASE, _EACH, _STACKED, METHOD, _NONE, _NONE)
"""What the rows are at first."""


class CompareMerges(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisCompareMerges",
            ["compare lora merges", "xy plot"],
            inputs=[
                *model_inputs(),
                *(_row(number, first) for number, first in enumerate(_FIRST, 1)),
                *sampling_inputs(),
                preset_input(),
                minutes_input(),
                io.String.Input("strengths", default="1", optional=True),
                *beside_inputs(),
                io.String.Input("prompt", optional=True, force_input=True),
            ],
            group="compare",
            outputs=("MODEL", "CLIP", "labels", "report", "prompts"),
            lists=("MODEL", "CLIP", "labels", "prompts"),
        )

    @classmethod
    def execute(
        cls, model: Any, concepts: Any, clip: Any = None, prompt: str = "", **values: Any
    ) -> io.NodeOutput:
        """For a list of prompts ComfyUI runs it once for each; merges are kept."""
        request = Request.of(values, model)
        rows = _rows(values, specs_of(concepts), request)
        strengths = _strengths(values.get("strengths", "1"))
        node_id = cls.hidden.unique_id
        drawn: list[tuple[str, Any, Any]] = []
        reports: list[str] = []
        headlines: list[str] = []
        for label, config in rows:
            if config is None:
                drawn.append((label, model, clip))
                continue
            merge = merged(model, clip, config, request, node_id)
            reports.append(f"{label}: {merge.report}")
            headlines.append(f"{label}: {merge.headline}")
            for strength in strengths:
                at = replace(merge, lora=scaled_lora(merge.lora, strength))
                name = label if strengths == [1] else f"{label} at {strength:g}"
                drawn.append((name, *apply_lora(model, clip, as_lora_model(at))))
        report, shown = "\n".join(reports), "\n".join([*headlines, _DETAILS])
        show_text(shown, node_id)
        labels, models, clips = (list(column) for column in zip(*drawn, strict=True))
        prompts, ui = [prompt] * len(drawn), {**ui_text(shown), "report": [report]}
        return io.NodeOutput(models, clips, labels, report, prompts, ui=ui)


def _row(number: int, first: str) -> Any:
    choices = [_NONE, _BASE, _EACH, _STACKED, *(name for name in method_names() if name != _SUM)]
    return io.Combo.Input(f"row_{number}", options=choices, default=first, optional=True)


def _strengths(text: str) -> list[float]:
    """Those that are listed, each once; 1 where none is."""
    try:
        found = [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise IterisError(
            'Compare Merges: strengths are numbers with commas between, as "0.6, 1, 1.4", and '
            f"{text!r} has something else."
        ) from error
    if not all(math.isfinite(strength) for strength in found):
        raise IterisError(
            f"Compare Merges: strengths must be finite, and {text!r} has one that is not."
        )
    return list(dict.fromkeys(found)) or [1.0]


def _rows(
    values: Mapping[str, Any], specs: Sequence[Concept], request: Request
) -> list[tuple[str, MergeConfig | None]]:
    """Label and merge of every row; None for the base."""

    def stacked(some: Sequence[Concept]) -> MergeConfig:
        """As Load LoRA adds them up: no weight and no rank counts."""
        whole = [replace(spec, weight=1.0) for spec in some if spec.is_active]
        return request.config(whole, _SUM).model_copy(update={"settings": {}})

    always = [spec for spec in specs if spec.always_on != "no"]
    active = [spec for spec in specs if spec.file is not None and spec.is_active]
    own = [spec for spec in active if spec not in always]
    rows: list[tuple[str, MergeConfig | None]] = []
    for number in range(1, len(_FIRST) + 1):
        name: str = values.get(f"row_{number}", _NONE)
        if name == _EACH:
            rows += [(f"{spec.file.stem} alone", stacked([spec, *always])) for spec in own]
        elif name == _STACKED:
            rows.append((name, stacked(specs)))
        elif name != _NONE:
            rows.append((name, None if name == _BASE else request.config(specs, name)))
    if not rows:
        raise IterisError("Compare Merges has no rows; choose a method for at least one.")
    return rows
