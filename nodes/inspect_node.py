"""The node that inspects LoRAs and previews their merge."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

from comfy_api.latest import io

from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files import ReadOptions
from ..iteris_core.preview import preview_merge
from ..iteris_core.reading import read_concept
from ..iteris_core.report.inspection import (
    describe,
    interference,
    numbered,
    plot_loras,
    to_table,
)
from .comfy_host import ComfyHost
from .comfy_runtime import NodeProgress, files_behind, show_text
from .comfy_state import ready_for_merge
from .lora_stacks import specs_of
from .merge_settings import Request
from .pictures import figure_image
from .schema import GRAPH, method_inputs, model_inputs, schema

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
        )

    @classmethod
    def execute(
        cls, model: Any, concepts: Any, clip: Any = None, method: str = "iteris", **values: Any
    ) -> io.NodeOutput:
        node_id = cls.hidden.unique_id
        request = Request.of(values, files_behind(cls.hidden, "model"), model)
        specs = specs_of(concepts)
        with ready_for_merge(clip), ComfyHost(model, clip, **request.base) as host:
            reading = ReadOptions(allow_partial=True, vectors=True)
            loaded = [read_concept(spec, host, reading) for spec in specs]
            loras = numbered([replace(c.lora, name=c.name) for c in loaded if c.lora is not None])
            if not loras:
                raise IterisError("No LoRA is connected; connect at least one.")
            pairs = [interference(one, two) for one, two in combinations(loras, 2)]
            facts = [describe(lora) for lora in loras]
            lines = [to_table(facts, pairs)]
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
        return io.NodeOutput(figure_image(plot_loras(facts)), table)
