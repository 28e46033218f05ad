"""The node that merges with several methods."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..iteris_core.errors import IterisError
from ..iteris_core.methods import all_methods, find_method
from .comfy_lora import apply_lora
from .comfy_runtime import files_behind, show_text
from .lora_stacks import specs_of
from .merge_cache import merged
from .merge_inputs import beside_inputs, model_inputs, preset_input, sampling_inputs
from .merge_settings import Request
from .merging import as_lora_model
from .schema import schema

_BASE = "base"


class CompareMerges(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisCompareMerges",
            "IterIS Compare Merges",
            ["compare lora merges", "xy plot"],
            inputs=[
                *model_inputs(),
                io.String.Input(
                    "methods",
                    default="iteris, average, sum, ties",
                    tooltip="Names of methods with commas between them "
                    f"({', '.join(method.name for method in all_methods())}); base stands for no "
                    "LoRA at all.",
                ),
                *sampling_inputs(),
                preset_input(),
                *beside_inputs(),
            ],
            group="compare",
            outputs=[
                io.Model.Output(display_name="MODEL", is_output_list=True),
                io.Clip.Output(display_name="CLIP", is_output_list=True),
                io.String.Output(display_name="labels", is_output_list=True),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        concepts: Any,
        methods: str,
        clip: Any = None,
        **values: Any,
    ) -> io.NodeOutput:
        names = [name.strip() for name in methods.split(",") if name.strip()]
        if not names:
            raise IterisError("Compare Merges has no methods; write iteris, average for example.")
        for name in names:
            if name != _BASE:
                find_method(name)
        request = Request.of(values, files_behind(cls.hidden, "model"), model)
        node_id, specs = cls.hidden.unique_id, specs_of(concepts)
        models, clips, reports = [], [], []
        for name in names:
            drawn = model, clip
            if name != _BASE:
                result = merged(model, clip, request.config(specs, name), request, node_id)
                drawn = apply_lora(model, clip, as_lora_model(result))
                reports.append(result.report.summary() + request.note)
            models.append(drawn[0])
            clips.append(drawn[1])
        report = "\n".join(reports)
        show_text(report, node_id)
        return io.NodeOutput(models, clips, names, report)
