"""The node that inspects LoRAs and previews their merge."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import combinations
from typing import Any

from comfy_api.latest import io

from ..iteris_core.concepts import Concept
from ..iteris_core.config import MergeConfig
from ..iteris_core.errors import IterisError
from ..iteris_core.lora import Lora
from ..iteris_core.preview import preview_merge
from ..iteris_core.report.inspection import LoraFacts, describe, interference
from .before_merge import cautions, check
from .comfy_host import ComfyHost
from .comfy_runtime import NodeProgress, show_text, ui_text
from .comfy_state import ready_for_merge
from .concept_specs import specs_of
from .lora_info import Inspected, inspected
from .merge_settings import Request
from .pictures import to_plot
from .schema import METHOD, discreetly, method_inputs, model_inputs, schema

_ALIKE = 0.5
"""The conflict at which two LoRAs count as alike. For changes of equal size it is their cosine:
they share half of their effect."""


class InspectLoras(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisInspectLoras",
            ["lora info", "lora interference", "dry run", "lora compatibility"],
            inputs=[*model_inputs(needed=False), *method_inputs()],
            group="files",
            outputs=("plot", "table"),
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any = None,
        concepts: Any = (),
        clip: Any = None,
        method: str = METHOD,
        **values: Any,
    ) -> io.NodeOutput:
        node_id, specs = cls.hidden.unique_id, specs_of(concepts)
        request = Request.of(values, model)
        config = request.config(specs, method)
        with ExitStack() as stack:
            progress = stack.enter_context(NodeProgress(node_id))
            stack.enter_context(ready_for_merge(clip))
            host = model and stack.enter_context(ComfyHost(model, clip, **request.base))
            found = [inspected(spec, host) for spec in specs if spec.file is not None]
            if not found:
                raise IterisError("No LoRA is connected; connect at least one.")
            loras = _named(one.concept for one in found if not one.refusal)
            facts = [describe(lora) for lora in loras]
            lines = [*_table(facts, loras), *(one.information for one in found)]
            lines += [f"DOES NOT FIT: {one.refusal}" for one in found if one.refusal]
            lines += [f"{lora.name}: {note}" for lora in loras for note in lora.notes]
            if host is None:
                lines.append("Connect MODEL and CLIP to see the plan of a merge.")
            else:
                lines += _outlook(host, found, config, request, progress)
        table = "\n".join(lines)
        show_text(table, node_id)
        return io.NodeOutput(to_plot(_plot(facts)), table, ui=ui_text(table))


def _named(concepts: Iterable[Concept]) -> list[Lora]:
    """Their LoRAs, with a name each: of two "sks" the second is "sks (2)"."""
    named, names = list[Lora](), list[str]()
    for concept in concepts:
        assert concept.lora is not None
        count = names.count(concept.name)
        name = f"{concept.name} ({count + 1})" if count else concept.name
        named.append(replace(concept.lora, name=name))
        names.append(concept.name)
    return named


def _table(facts: Sequence[LoraFacts], loras: Sequence[Lora]) -> list[str]:
    """A line for each LoRA, and for each pair of one base what they have in common."""
    lines = [f"{'LoRA':24} {'sites':>6} {'rank':>8} {'size':>8}"] if facts else []
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
                f"{both} are ALIKE ({pair.conflict:.0%}): two versions of one LoRA? Merge one of "
                "them."
            )
    return lines


def _outlook(
    host: ComfyHost,
    found: Sequence[Inspected],
    config: MergeConfig,
    request: Request,
    progress: NodeProgress,
) -> list[str]:
    """What speaks against a merge, and its plan; or why it would fail."""
    loras = [one.concept for one in found]
    lines = [
        f"{one.name}: no trigger words and no prompts; it acts on every prompt. Type its words if "
        "it has any."
        for one in loras
        if one.always_on == "no" and one.is_wordless
    ]
    lines += cautions(host.model, request.references.latent, config).values()
    try:
        if refusals := [one.refusal for one in found if one.refusal]:
            raise IterisError(refusals[0])
        check(config)
        preserved = [spec for spec in config.concepts if spec.preserves]
        how = {**config.choices, "on_progress": progress}
        budget = request.memory_budget
        lines += preview_merge(host, [*loras, *preserved], **how, memory_budget=budget).lines()
    except IterisError as error:
        lines.append(f"A merge would fail: {discreetly(error)}")
    return lines


def _plot(facts: Sequence[LoraFacts]) -> Any:
    """A heat map, block × LoRA, of each block's share of the LoRA's energy, as a matplotlib
    Figure."""
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(block for lora in facts for block in lora.blocks))
    if not facts:
        return Figure(figsize=(4, 1))
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
