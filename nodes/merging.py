"""One merge on a MODEL and CLIP: memory, progress, interrupt, and the LoRA in ComfyUI's form."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..iteris_core.config import MergeConfig, read_concept
from ..iteris_core.errors import IterisError, OutOfMemory
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions, to_tensors
from ..iteris_core.lora_files.embeddings import bundled
from ..iteris_core.lora_files.experts import split_experts
from ..iteris_core.merge import MergeResult, merge_loras
from ..iteris_core.methods import find_method
from ..iteris_core.report.provenance import cut_lora
from ..iteris_core.settings import PRESETS, declared_settings
from ..iteris_core.solve.choose import THRESHOLDS, Thresholds
from .comfy_host import ComfyHost
from .comfy_runtime import NodeProgress, could_free, show_text
from .comfy_state import ready_for_merge
from .concept_specs import DENOISER
from .kept import Merge, Place, in_half, keep, kept, place_of, store
from .merge_settings import Request

_ROWS = 32
_NOISE = 1.25
"""How many times as much memory must be free as when it was short: it is never twice the same."""
_NOTE = (
    "  Made before with the same inputs, so nothing ran. To make it again, set kept to make again "
    "in IterIS Settings."
)
_FINISHED_SAMPLES = "Only finished samples are kept, so another run is shorter."
_WITHOUT_STEPS = "The merge is kept without steps."
_log = logging.getLogger(__name__)


class LoraModel(dict[str, Tensor]):
    """A merged LoRA's tensors as in its half-precision file: core's ``LORA_MODEL``, plus the
    metadata, the ``lora`` itself for other precisions, and whether its components are ``ordered``
    by output energy."""

    def __init__(self, lora: Lora, dtype: str = "float16", *, ordered: bool = False) -> None:
        # Copies of inference-mode tensors would be inference tensors too.
        with torch.inference_mode(False):
            tensors, self.metadata = to_tensors(lora, dtype=dtype)
            tensors |= bundled(lora.embeddings)
        super().__init__(tensors)
        self.lora, self.dtype, self.ordered = lora, dtype, ordered

    def at(self, dtype: str = "", rank: int = 0) -> LoraModel:
        """The same LoRA in another ``dtype`` (empty: its own), cut to ``rank`` (0: as it is)."""
        lora = cut_lora(self.lora, rank, ordered=self.ordered) if rank else self.lora
        return LoraModel(lora, dtype or self.dtype, ordered=self.ordered)


def merge_on(
    model: Any,
    clip: Any,
    config: MergeConfig,
    node_id: str | None = None,
    *,
    rows: int = _ROWS,
    memory_budget: int | Literal["free"] = "free",
    thresholds: Thresholds = THRESHOLDS,
    again: bool = False,
    rescue: Callable[[MergeResult], None] | None = None,
    **base: Any,
) -> MergeResult:
    """Merge with at most ``rows`` rows per forward; halved whenever memory runs out.

    ``memory_budget`` is the memory in bytes that the merge may use beyond the model; by default
    ComfyUI's free memory. The node and the report show the resulting plan. Settings that the method
    lacks are ignored; ``thresholds`` holds the thresholds; with ``again`` samples that are kept are
    made again, too; ``rescue`` gets what there is if the user interrupts during the steps; ``base``
    are arguments of :class:`.comfy_host.ComfyHost`. Raises :class:`IterisError` if the merge cannot
    fit.
    """
    known = declared_settings(find_method(config.method).settings)
    reading = ReadOptions(allow_partial=config.unmergeable == "skip")
    settings = {**config.settings, "micro_batch": rows}
    settings = {name: value for name, value in settings.items() if name in known}
    samples = store("samples", anew=again)
    progress = NodeProgress(node_id, *([_FINISHED_SAMPLES] if samples is not None else []))

    def rescued(result: MergeResult) -> None:
        if rescue is not None:
            rescue(result)
            progress.kept = _WITHOUT_STEPS

    with progress, ready_for_merge(clip), ComfyHost(model, clip, rows, **base) as host:
        try:
            result = merge_loras(
                host,
                [read_concept(concept, host, reading) for concept in config.concepts],
                **{**config.choices, "settings": settings},
                on_progress=progress,
                memory_budget=memory_budget,
                thresholds=thresholds,
                store=samples,
                rescue=rescue and rescued,
            )
        except OutOfMemory as error:  # the node has an input in pixels
            raise OutOfMemory(str(error).replace("latent_size", "image_size")) from error
    _log.info("IterIS: merged with %s on %d rows", config.method, result.report.rows)
    return result


def as_lora_model(merge: Merge, dtype: str = "float16") -> LoraModel:
    """``merge`` as if saved and reloaded, with its embeddings included."""
    try:
        return LoraModel(merge.lora, dtype, ordered=merge.ordered)
    except IterisError:  # for values that do not fit in half precision
        return LoraModel(merge.lora, "float32", ordered=merge.ordered)


def as_lora_models(merge: Merge, dtype: str = "float16") -> list[LoraModel]:
    """The LoRAs for the models for high and low noise."""
    parts = split_experts(merge.lora, DENOISER)
    return [as_lora_model(replace(merge, lora=part), dtype) for part in parts]


def merged(
    model: Any,
    clip: Any,
    config: MergeConfig,
    request: Request,
    node_id: str | None,
    *,
    low: Any = None,
    boundary: float | None = None,
) -> Merge:
    """The merge of ``config``, perhaps one that was kept; ``low`` and ``boundary`` as in
    :class:`.comfy_host.ComfyHost`."""
    show_text("Reading the LoRAs", node_id)  # large files take seconds
    models = [model] if low is None else [model, low]
    place = place_of(models, clip, config, request, boundary)
    memory, again = request.memory_budget, request.again
    limits: dict[str, float] = {
        "minutes": config.calibration.get("minutes") or math.inf,
        "memory": could_free(model) if memory == "free" else memory,
    }
    found = None if place is None else kept(place, model, clip, config.concepts)
    if place is not None and found is not None and found.serves(limits, again=again):
        if found.again and not again:  # choosing it once more makes it once more
            keep(replace(found, again=False), place)
        return replace(found, report=f"{found.report}\n{_NOTE}")
    experts = {} if low is None else {"low": low, "boundary": boundary}
    base: dict[str, Any] = {**request.base, **experts}
    most = {**limits, "memory": limits["memory"] * (_NOISE if memory == "free" else 1)}

    def kept_as(result: MergeResult, place: Place | None, *, again: bool = again) -> Merge:
        merge = Merge.of(replace(result, lora=in_half(result.lora)), most, again=again)
        if place is not None:
            keep(merge, place)
        return merge

    def rescue(result: MergeResult) -> None:
        """Keep a merge that was interrupted in its steps as what it is: one without steps."""
        settings = {name: value for name, value in config.settings.items() if name != "steps"}
        settings |= {"steps": 0} if PRESETS[config.preset].settings.get("steps") else {}
        without = config.model_copy(update={"settings": settings})
        kept_as(result, place_of(models, clip, without, request, boundary), again=False)

    result = merge_on(
        model, clip, config, node_id, memory_budget=memory, again=again,
        rescue=None if place is None else rescue, **base,
    )  # fmt: skip
    return kept_as(result, place)
