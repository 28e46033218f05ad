"""Nodes that merge: on one model, and on two experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..iteris_core.lora_files.embeddings import bundled
from ..iteris_core.merge import MergeResult
from ..iteris_core.methods import all_methods
from ..iteris_core.presets import PresetName
from ..iteris_core.report.plots import plot_residuals
from .comfy_host import BOUNDARY
from .comfy_lora import apply_lora
from .comfy_runtime import files_behind, show_text
from .concept_specs import ConceptSpec
from .embedding_files import how_to_call
from .merge_inputs import (
    Extras,
    advanced_inputs,
    budget_of,
    calibration_of,
    extra_inputs,
    left_out,
    memory_inputs,
    model_inputs,
    preset_input,
    sampling_inputs,
    settings_of,
)
from .merging import as_lora_model, as_lora_models, merge_on
from .pictures import figure_image, text_image
from .schema import LoraModel, schema

_CALIBRATION = ("samples", "seed", "timesteps", "latent_size", "latents", "frames")
_HIDDEN = [io.Hidden.unique_id, io.Hidden.prompt]


def _method_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "method",
            options=[method.name for method in all_methods()],
            default="iteris",
            tooltip="iteris, or one of the methods that it is compared with.",
        ),
        *sampling_inputs(),
        *advanced_inputs(),
        preset_input(),
        *memory_inputs(),
        *extra_inputs(),
    ]


def _report_outputs() -> list[Any]:
    return [
        io.String.Output(
            display_name="report", tooltip="What was merged, and how well each concept fits."
        ),
        io.Image.Output(display_name="plot", tooltip="Output error of each concept in each block."),
    ]


def _lora_output(name: str, which: str = "The merged LoRA") -> Any:
    return LoraModel.Output(display_name=name, tooltip=f"{which}, for Save Merged LoRA.")


class IterisMerge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisMerge",
            "IterIS Merge",
            ["merge loras", "combine loras", "multi concept"],
            description="Merges LoRAs into one by least squares on what the merged model really "
            "sees.",
            inputs=[*model_inputs(), *_method_inputs()],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The MODEL with the merged LoRA."),
                io.Clip.Output(display_name="CLIP", tooltip="The CLIP with the merged LoRA."),
                _lora_output("lora"),
                *_report_outputs(),
            ],
            hidden=_HIDDEN,
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, concepts: tuple[ConceptSpec, ...], **values: Any
    ) -> io.NodeOutput:
        files = files_behind(cls.hidden, "model")
        result, report = _merge(cls.hidden.unique_id, model, clip, concepts, files, values)
        lora = as_lora_model(result, concepts, values["dtype"])
        return io.NodeOutput(*apply_lora(model, clip, lora), lora, report, _plot(result))


class IterisMergeExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        model, clip, concepts = model_inputs()
        model.tooltip = "The model for high noise; it is only run, never changed."
        return schema(
            "IterisMergeExperts",
            "IterIS Merge Experts",
            ["wan 2.2 14b", "high noise low noise", "merge wan loras"],
            description="Merges LoRAs of a model in two parts, for high and for low noise (Wan 2.2 "
            "14B): two files of each concept in, two files out.",
            inputs=[
                model,
                io.Model.Input(
                    "model_low", tooltip="The model for low noise, which goes on where it ends."
                ),
                clip,
                concepts,
                io.Float.Input(
                    "boundary",
                    default=BOUNDARY,
                    min=0.0,
                    max=1.0,
                    step=0.005,
                    tooltip="The share of noise at which the model for low noise goes on: 0.875 "
                    "for Wan 2.2 from text, 0.9 from a picture.",
                ),
                *_method_inputs(),
            ],
            outputs=[
                io.Model.Output(
                    display_name="MODEL", tooltip="The MODEL for high noise with its merged LoRA."
                ),
                io.Model.Output(
                    display_name="MODEL low",
                    tooltip="The MODEL for low noise with its merged LoRA.",
                ),
                io.Clip.Output(display_name="CLIP", tooltip="The CLIP with the merged LoRA."),
                _lora_output("lora", "The merged LoRA for high noise"),
                _lora_output("lora low", "The merged LoRA for low noise"),
                *_report_outputs(),
            ],
            hidden=_HIDDEN,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        model_low: Any,
        clip: Any,
        concepts: tuple[ConceptSpec, ...],
        boundary: float,
        **values: Any,
    ) -> io.NodeOutput:
        files = [file for name in ("model", "model_low") for file in files_behind(cls.hidden, name)]
        result, report = _merge(
            cls.hidden.unique_id,
            model,
            clip,
            concepts,
            files,
            values,
            low=model_low,
            boundary=boundary,
        )
        high, low = as_lora_models(result, values["dtype"])
        merged, merged_clip = apply_lora(model, clip, high)
        merged_low, _ = apply_lora(model_low, clip, low)
        return io.NodeOutput(merged, merged_low, merged_clip, high, low, report, _plot(result))


def _merge(
    node_id: str,
    model: Any,
    clip: Any,
    concepts: tuple[ConceptSpec, ...],
    files: list[str],
    values: Mapping[str, Any],
    **experts: Any,
) -> tuple[MergeResult, str]:
    """The merge that the inputs' ``values`` ask for, and what the node says of it."""
    values = dict(values)
    method: str = values.pop("method")
    preset: PresetName = values.pop("preset", "default")
    memory: float = values.pop("memory", 0.0)
    values.pop("dtype")
    values.setdefault("frames", 0)
    calibration = calibration_of({name: values.pop(name) for name in _CALIBRATION}, preset)
    extras = Extras.of(files, **Extras.taken_from(values))
    result = merge_on(
        model,
        clip,
        concepts,
        method,
        settings_of(method, values, preset),
        calibration,
        node_id,
        memory_budget=budget_of(memory),
        **extras.options,
        **experts,
    )
    called = how_to_call(bundled(result.lora.embeddings))
    report = result.report.summary() + left_out(method, preset) + extras.note + called
    show_text(report, node_id)
    return result, report


def _plot(result: MergeResult) -> Any:
    if not result.report.blocks():
        return text_image(f"{result.report.method} looks at weights only: no output errors.")
    return figure_image(plot_residuals(result.report))
