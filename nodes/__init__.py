"""The V3 nodes: a thin layer over :mod:`iteris_core`."""

from __future__ import annotations

import logging

from comfy_api.latest import ComfyExtension, io

from .comfy_internals import missing, sentence
from .comfy_routes import add_routes
from .comfy_toybox import IterisToybox
from .concept_nodes import IterisConcept, IterisLoras, PreservePrompts
from .edit_nodes import ExtractLora, ResizeLora
from .inspect_node import InspectLoras
from .merge_nodes import CompareMerges, IterisMerge, IterisMergeExperts
from .merge_settings import IterisMergeSettings
from .save_node import SaveMergedLora
from .schema import discreet
from .score_nodes import (
    ClipImageAlignment,
    ClipScorerLoader,
    ClipTextAlignment,
    ScoreSheet,
    VisionScorer,
)

NODES: list[type[io.ComfyNode]] = [
    *(IterisLoras, IterisConcept, PreservePrompts),
    *(IterisMerge, IterisMergeSettings, IterisMergeExperts, CompareMerges),
    *(SaveMergedLora, ResizeLora, ExtractLora, InspectLoras),
    *(ClipScorerLoader, VisionScorer, ClipImageAlignment, ClipTextAlignment, ScoreSheet),
    IterisToybox,
]
NODES = [*map(discreet, NODES)]


if gone := missing():
    logging.getLogger(__name__).warning("IterIS: %s", sentence(gone))


class IterisExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> IterisExtension:
    add_routes()
    return IterisExtension()
