"""Nodes besides merging: they resize a LoRA, and extract one from a fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

from comfy_api.latest import io

from ..iteris_core.calibration import Calibration
from ..iteris_core.concepts import lines_of
from ..iteris_core.config import read_concept
from ..iteris_core.edit.extract import extract_lora
from ..iteris_core.edit.resize import resize_lora
from ..iteris_core.edit.target import Target
from ..iteris_core.errors import IterisError
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions
from .comfy_host import ComfyHost
from .comfy_lora import apply_lora
from .comfy_runtime import NodeProgress, show_text, ui_text
from .comfy_state import ready_for_merge
from .concept_specs import rows_named, specs_of
from .merge_settings import Request
from .merging import LoraModel as TensorsOfLora
from .schema import (
    MERGED,
    MergeSettings,
    model_inputs,
    schema,
    setting_input,
)

_BY = ["outputs", "weights"]
_TARGETS = ("rank", "megabytes", "energy")


def _target_inputs() -> list[Any]:
    numbers = {"min": 0.0, "optional": True}
    return [
        io.Combo.Input("target", options=list(_TARGETS), default="rank", optional=True),
        io.Int.Input("rank", default=8, min=0, max=1024, optional=True),
        io.Float.Input("megabytes", default=50.0, max=10000.0, step=1.0, **numbers),
        io.Float.Input("energy", default=0.9, max=0.999, step=0.01, **numbers),
    ]


def _run_inputs() -> list[Any]:
    return [
        setting_input(Calibration, "samples"),
        setting_input(Calibration, "seed"),
        MergeSettings.Input("settings", optional=True),
    ]


def _target(values: Mapping[str, Any]) -> Target:
    """Of the three numbers the one that ``target`` names; without it, as in graphs of earlier
    versions, the first that is not 0."""
    name = values.get("target") or next(filter(values.get, _TARGETS), "rank")
    if not values.get(name):
        raise IterisError(f"target is {name}, but {name} is 0; set it, or choose another target.")
    return Target(**{name: values[name]})


def _run(progress: NodeProgress, request: Request) -> dict[str, Any]:
    """How the library is to run the model, and to count the file's size: two bytes per number."""
    return {
        "calibration": request.config((), "iteris").calibration,
        "itemsize": 2,
        "on_progress": progress,
        "memory_budget": request.memory_budget,
    }


def _output(hidden: Any, model: Any, clip: Any, lora: Lora, lines: Sequence[str]) -> io.NodeOutput:
    tensors, report = TensorsOfLora(lora, ordered=True), "\n".join(lines)
    show_text(report, hidden.unique_id)
    applied = (None, None) if model is None else apply_lora(model, clip, tensors)
    return io.NodeOutput(*applied, tensors, report, ui=ui_text(report))


class ResizeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisResizeLora",
            ["resize lora", "reduce rank", "shrink lora", "lora rank", "compress lora"],
            inputs=[
                *model_inputs(needed=False),
                *_target_inputs(),
                io.Combo.Input("by", options=_BY, default="outputs", optional=True),
                *_run_inputs(),
            ],
            group="files",
            outputs=MERGED,
        )

    @classmethod
    def execute(
        cls,
        model: Any = None,
        concepts: Any = (),
        clip: Any = None,
        by: Literal["outputs", "weights"] = "outputs",
        **values: Any,
    ) -> io.NodeOutput:
        request, target = Request.of(values, model), _target(values)
        specs = [spec for spec in specs_of(concepts) if spec.file]
        if len(specs) != 1:
            raise IterisError(f"Resize LoRA takes one LoRA, but {len(specs)} are connected and on.")
        if model is None and by == "outputs":
            raise IterisError(
                "No MODEL is connected, and Resize LoRA runs it. Connect MODEL and CLIP, or set by "
                "to weights."
            )
        reading = ReadOptions(allow_partial=request.config((), "iteris").unmergeable == "skip")
        with (
            NodeProgress(cls.hidden.unique_id) as progress,
            rows_named(specs),
            ready_for_merge(clip),
            ExitStack() as stack,
        ):
            host = model and stack.enter_context(ComfyHost(model, clip, **request.base))
            concept, runs = read_concept(specs[0], host, reading), host if by == "outputs" else None
            found = resize_lora(concept, target, runs, **_run(progress, request))
        lines = [found.summary(), *found.lora.notes]
        return _output(cls.hidden, model, clip, found.lora, lines)


class ExtractLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisExtractLora",
            ["extract lora", "model difference", "checkpoint to lora", "subtract models"],
            inputs=[
                io.Model.Input("model"),
                io.Model.Input("model_tuned"),
                io.Clip.Input("clip"),
                io.Clip.Input("clip_tuned", optional=True),
                *_target_inputs(),
                io.String.Input("prompts", default="", multiline=True, optional=True),
                *_run_inputs(),
            ],
            group="files",
            outputs=MERGED,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        model_tuned: Any,
        clip: Any,
        clip_tuned: Any = None,
        prompts: str = "",
        **values: Any,
    ) -> io.NodeOutput:
        request, target, clip_tuned = Request.of(values, model), _target(values), clip_tuned or clip
        with (
            NodeProgress(cls.hidden.unique_id) as progress,
            ready_for_merge(clip),
            ready_for_merge(clip_tuned),
            ComfyHost(model, clip, **request.base) as base,
            ComfyHost(model_tuned, clip_tuned, **request.base) as tuned,
        ):
            how = {"prompts": lines_of(prompts) or None, **_run(progress, request)}
            found = extract_lora(base, tuned, target, base.base, **how)
        return _output(cls.hidden, model, clip, found.lora, [found.summary()])
