"""The V3 nodes: thin over :mod:`iteris_core`."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .concept_nodes import ConceptsFromStack, IterisConcept, PreservePrompts
from .lora_nodes import CompareMerges, InspectLoras, SaveMergedLora
from .merge_nodes import IterisMerge, IterisMergeExperts
from .score_nodes import ClipImageAlignment, ClipScorerLoader, ClipTextAlignment, ScoreSheet
from .toybox_node import IterisToybox

NODES: list[type[io.ComfyNode]] = [
    IterisConcept,
    ConceptsFromStack,
    PreservePrompts,
    IterisMerge,
    IterisMergeExperts,
    CompareMerges,
    SaveMergedLora,
    InspectLoras,
    ClipScorerLoader,
    ClipImageAlignment,
    ClipTextAlignment,
    ScoreSheet,
    IterisToybox,
]


class IterisExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> IterisExtension:
    return IterisExtension()
