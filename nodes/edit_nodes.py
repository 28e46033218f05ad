"""Nodes besides merging: they inspect LoRAs and preview their merge, resize a LoRA, and extract one
from a fine-tune."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

from comfy_api.latest import io

from ..iteris_core.concepts import Calibration, lines_of
from ..iteris_core.config import read_concept
from ..iteris_core.edit.extract import extract_lora
from ..iteris_core.edit.resize import resize_lora
from ..iteris_core.errors import IterisError
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions
from ..iteris_core.preview import preview_merge
from ..iteris_core.report.inspection import Interference, LoraFacts, describe, interference
from ..iteris_core.solve.ranks import Target
from .comfy_host import ComfyHost
from .comfy_lora import apply_lora
from .comfy_runtime import NodeProgress, is_linked, show_text, ui_text
from .comfy_state import ready_for_merge
from .concept_specs import specs_of
from .merge_settings import Request
from .merging import LoraModel as TensorsOfLora
from .pictures import figure_image
from .schema import (
    GRAPH,
    MERGED,
    MergeSettings,
    concepts_input,
    method_inputs,
    model_inputs,
    schema,
    setting_input,
)

_ITEMSIZE = 2  # bytes per number in the file: float16


def _target_inputs() -> list[Any]:
    return [
        io.Int.Input("rank", default=8, min=0, max=1024),
        io.Float.Input("megabytes", default=0.0, min=0.0, max=10000.0, step=1.0),
        io.Float.Input("energy", default=0.0, min=0.0, max=0.999, step=0.01),
    ]


def _run_inputs() -> list[Any]:
    return [
        setting_input(Calibration, "samples"),
        setting_input(Calibration, "seed"),
        MergeSettings.Input("settings", optional=True),
    ]


@dataclass(frozen=True)
class _Edit:
    """A node's ``values`` as library arguments; results as the node's display and outputs."""

    hidden: Any
    model: Any
    clip: Any
    values: Mapping[str, Any]

    @property
    def request(self) -> Request:
        return Request.of(self.values, self.model)

    @property
    def target(self) -> Target:
        rank, megabytes, energy = (self.values[n] for n in ("rank", "megabytes", "energy"))
        if sum(map(bool, (rank, megabytes, energy))) != 1:
            raise IterisError("Set one of rank, megabytes and energy; set the others to 0.")
        return Target(rank or None, megabytes or None, energy or None)

    @property
    def run(self) -> dict[str, Any]:
        request = self.request
        return {
            "calibration": request.config((), "iteris").calibration,
            "itemsize": _ITEMSIZE,
            "on_progress": NodeProgress(self.hidden.unique_id),
            "memory_budget": request.memory_budget,
        }

    def output(self, lora: Lora, lines: Sequence[str]) -> io.NodeOutput:
        tensors, report = TensorsOfLora(lora, ordered=True), "\n".join(lines)
        show_text(report, self.hidden.unique_id)
        model, clip = apply_lora(self.model, self.clip, tensors)
        return io.NodeOutput(model, clip, tensors, report, ui=ui_text(report))


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
                io.Combo.Input("by", options=["outputs", "weights"], default="outputs"),
                *_run_inputs(),
            ],
            group="files",
            outputs=MERGED,
            hidden=GRAPH,
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
        edit = _Edit(cls.hidden, model, clip, values)
        target, specs = edit.target, [spec for spec in specs_of(concepts) if spec.file]
        if len(specs) != 1:
            raise IterisError(f"Resize LoRA takes one LoRA, but {len(specs)} are connected and on.")
        reading = ReadOptions(allow_partial=edit.request.config((), "iteris").unmergeable == "skip")
        with ready_for_merge(clip), ComfyHost(model, clip, **edit.request.base) as host:
            concept = read_concept(specs[0], host, reading)
            found = resize_lora(concept, target, host if by == "outputs" else None, **edit.run)
        return edit.output(found.lora, [found.summary(), *found.lora.notes])


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
                io.String.Input("prompts", default="", multiline=True),
                *_run_inputs(),
            ],
            group="files",
            outputs=MERGED,
            hidden=GRAPH,
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
        edit, clip_tuned = _Edit(cls.hidden, model, clip, values), clip_tuned or clip
        target, options = edit.target, edit.request.base
        with (
            ready_for_merge(clip),
            ready_for_merge(clip_tuned),
            ComfyHost(model, clip, **options) as base,
            ComfyHost(model_tuned, clip_tuned, **options) as tuned,
        ):
            found = extract_lora(
                base, tuned, target, base.base, prompts=lines_of(prompts) or None, **edit.run
            )
        return edit.output(found.lora, [found.summary()])


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
            hidden=GRAPH,
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, model: Any, concepts: Any, clip: Any = None, method: str = "iteris", **values: Any
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        request = Request.of(values, model)
        specs = specs_of(concepts)
        with ready_for_merge(clip), ComfyHost(model, clip, **request.base) as host:
            reading = ReadOptions(allow_partial=True, vectors=True)
            loaded = [read_concept(spec, host, reading) for spec in specs]
            loras = _numbered([replace(c.lora, name=c.name) for c in loaded if c.lora is not None])
            if not loras:
                raise IterisError("No LoRA is connected; connect at least one.")
            pairs = [interference(one, two) for one, two in combinations(loras, 2)]
            facts = [describe(lora) for lora in loras]
            lines = [_to_table(facts, pairs)]
            for lora in loras:
                lines += [f"{lora.name}: {note}" for note in lora.notes]
            lines += [
                f"{pair.first} and {pair.second} are ALIKE ({pair.conflict:.0%}): two versions of "
                "one LoRA? Merge one of them."
                for pair in pairs
                if pair.conflict > _ALIKE
            ]
            lines += [
                f"{concept.name}: no trigger words and no prompts; it acts on every prompt. Type "
                "its words if it has any."
                for spec, concept in zip(specs, loaded, strict=True)
                if spec.file is not None
                and spec.prompts is None
                and not spec.phrases
                and spec.always_on == "no"
            ]
            try:
                lines += preview_merge(
                    host,
                    loaded,
                    **request.config(specs, method).choices,
                    on_progress=NodeProgress(node_id),
                    memory_budget=request.memory_budget,
                ).lines()
            except IterisError as error:
                lines.append(f"A merge would fail: {error}")
        table = "\n".join(lines)
        show_text(table, node_id)
        plot = figure_image(_plot_loras(facts)) if is_linked(cls.hidden, 0) else None
        return io.NodeOutput(plot, table, ui=ui_text(table))


def _numbered(loras: Sequence[Lora]) -> list[Lora]:
    """The LoRAs with unique names: two LoRAs "sks" become "sks" and "sks (2)"."""
    names = [lora.name for lora in loras]
    counts = [names[: index + 1].count(name) for index, name in enumerate(names)]
    return [
        replace(lora, name=f"{lora.name} ({count})") if count > 1 else lora
        for lora, count in zip(loras, counts, strict=True)
    ]


def _to_table(facts: Sequence[LoraFacts], pairs: Sequence[Interference]) -> str:
    """One line per LoRA and per pair, as plain text; overlap is that of the row spaces."""
    lines = [f"{'LoRA':24} {'sites':>6} {'rank':>8} {'size':>8}"]
    for lora in facts:
        ranks = "/".join(map(str, lora.ranks))
        size = math.hypot(*(block.norm for block in lora.blocks.values()))
        lines.append(f"{lora.name:24} {lora.sites:6} {ranks:>8} {size:8.2f}")
    lines += [
        f"{pair.first} and {pair.second}: overlap {pair.rows:.0%}, conflict {pair.conflict:.0%}"
        for pair in pairs
        if pair.shared
    ]
    return "\n".join(lines)


def _plot_loras(facts: Sequence[LoraFacts]) -> Any:
    """A heat map, block × LoRA, of each block's share of the LoRA's energy.

    Returns a matplotlib Figure; save it with ``savefig``.
    """
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
