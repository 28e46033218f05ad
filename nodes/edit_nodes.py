"""Nodes besides merging: they inspect LoRAs and preview their merge, resize a LoRA, and extract one
from a fine-tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
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
from ..iteris_core.preview import preview_merge
from ..iteris_core.report.inspection import LoraFacts, describe, interference
from .comfy_host import ComfyHost
from .comfy_lora import apply_lora
from .comfy_runtime import NodeProgress, show_text, ui_text
from .comfy_state import ready_for_merge
from .concept_specs import specs_of
from .merge_settings import Request
from .merging import LoraModel as TensorsOfLora
from .pictures import to_plot
from .schema import (
    MERGED,
    MergeSettings,
    concepts_input,
    method_inputs,
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
    return io.NodeOutput(*apply_lora(model, clip, tensors), tensors, report, ui=ui_text(report))


class ResizeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisResizeLora",
            ["resize lora", "reduce rank", "shrink lora", "lora rank", "compress lora"],
            inputs=[
                io.Model.Input("model"),
                io.Clip.Input("clip", optional=True),
                concepts_input(),
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
        model: Any,
        concepts: Any,
        clip: Any = None,
        by: Literal["outputs", "weights"] = "outputs",
        **values: Any,
    ) -> io.NodeOutput:
        request, target = Request.of(values, model), _target(values)
        specs = [spec for spec in specs_of(concepts) if spec.file]
        if len(specs) != 1:
            raise IterisError(f"Resize LoRA takes one LoRA, but {len(specs)} are connected and on.")
        reading = ReadOptions(allow_partial=request.config((), "iteris").unmergeable == "skip")
        with (
            NodeProgress(cls.hidden.unique_id) as progress,
            ready_for_merge(clip),
            ComfyHost(model, clip, **request.base) as host,
        ):
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


_ALIKE = 0.5
"""The conflict at which two LoRAs count as alike. For changes of equal size it is their cosine:
they share half of their effect."""


class InspectLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisInspectLoras",
            ["lora info", "lora interference", "dry run", "lora compatibility"],
            inputs=[*model_inputs(), *method_inputs()],
            group="files",
            outputs=("plot", "table"),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, concepts: Any, clip: Any = None, method: str = "iteris", **values: Any
    ) -> io.NodeOutput:
        node_id, specs = cls.hidden.unique_id, specs_of(concepts)
        request, reading = Request.of(values, model), ReadOptions(allow_partial=True)
        with (
            NodeProgress(node_id) as progress,
            ready_for_merge(clip),
            ComfyHost(model, clip, **request.base) as host,
        ):
            loaded = [read_concept(spec, host, reading) for spec in specs]
            loras = [replace(c.lora, name=c.name) for c in loaded if c.lora is not None]
            if not loras:
                raise IterisError("No LoRA is connected; connect at least one.")
            names = [lora.name for lora in loras]
            for at, name in enumerate(names):
                if count := names[:at].count(name):  # two LoRAs "sks": the second is "sks (2)"
                    loras[at] = replace(loras[at], name=f"{name} ({count + 1})")
            facts = [describe(lora) for lora in loras]
            lines = [f"{'LoRA':24} {'sites':>6} {'rank':>8} {'size':>8}"]
            for lora in facts:
                ranks = "/".join(map(str, lora.ranks))
                size = math.hypot(*(block.norm for block in lora.blocks.values()))
                lines.append(f"{lora.name:24} {lora.sites:6} {ranks:>8} {size:8.2f}")
            for pair in (interference(one, two) for one, two in combinations(loras, 2)):
                both = f"{pair.first} and {pair.second}"
                if pair.shared:
                    lines.append(f"{both}: overlap {pair.rows:.0%}, conflict {pair.conflict:.0%}")
                if pair.conflict > _ALIKE:
                    lines.append(
                        f"{both} are ALIKE ({pair.conflict:.0%}): two versions of one LoRA? Merge "
                        "one of them."
                    )
            lines += [f"{lora.name}: {note}" for lora in loras for note in lora.notes]
            lines += [
                f"{concept.name}: no trigger words and no prompts; it acts on every prompt. Type "
                "its words if it has any."
                for spec, concept in zip(specs, loaded, strict=True)
                if spec.file and not spec.prompts and not spec.phrases and spec.always_on == "no"
            ]
            how = {**request.config(specs, method).choices, "on_progress": progress}
            try:
                budget = request.memory_budget
                lines += preview_merge(host, loaded, **how, memory_budget=budget).lines()
            except IterisError as error:
                lines.append(f"A merge would fail: {error}")
        table = "\n".join(lines)
        show_text(table, node_id)
        return io.NodeOutput(to_plot(_plot(facts)), table, ui=ui_text(table))


def _plot(facts: Sequence[LoraFacts]) -> Any:
    """A heat map, block × LoRA, of each block's share of the LoRA's energy, as a matplotlib
    Figure."""
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(block for lora in facts for block in lora.blocks))
    shares = [[lora.blocks[b].share if b in lora.blocks else 0.0 for lora in facts] for b in blocks]
    most = max(map(max, shares))
    size = 4 + max(1.5, 0.5 * len(facts)), 1.5 + 0.35 * len(blocks)
    figure = Figure(figsize=size, layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, vmin=0, vmax=most, cmap="viridis", aspect="auto")
    axis.set_xticks(range(len(facts)), [lora.name for lora in facts], rotation=45, ha="right")
    axis.set_yticks(range(len(blocks)), blocks)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            color = "white" if share < 0.6 * most else "black"
            axis.text(x, y, f"{share:.2f}", ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, label="share of the LoRA's energy")
    return figure
