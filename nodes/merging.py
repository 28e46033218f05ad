"""One merge on a MODEL and CLIP: memory, progress, interrupt, and the LoRA in ComfyUI's form."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
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
from ..iteris_core.methods import all_methods, find_method
from ..iteris_core.progress import Progress
from ..iteris_core.report.provenance import cut_lora
from ..iteris_core.settings import PRESETS, declared_settings
from ..iteris_core.solve.choose import THRESHOLDS, Thresholds
from .before_merge import about_loras, cautions, check
from .comfy_host import ComfyHost
from .comfy_runtime import NodeProgress, could_free, show_text
from .comfy_state import ready_for_merge
from .concept_specs import DENOISER, rows_named
from .kept import Merge, in_half, keep, kept, place_of, store
from .merge_settings import Request

_ROWS = 32
_NOISE = 1.25
"""How many times as much memory must be free as when it was short: it is never twice the same."""
_NOTE = (
    "  Made before with the same inputs, so nothing ran. To make it again, set kept to make again "
    "in IterIS Settings."
)
_WITHOUT_STEPS = (
    "  {}, so this is the merge without steps. It is made again, with them, when kept is set to "
    "make again in IterIS Settings."
)
_FINISHED_SAMPLES = "Only finished samples are kept, so another run is shorter."
_RESCUED = "The merge without steps is kept: queue again to use it."
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
    warned: Mapping[str, str] | None = None,
    **base: Any,
) -> MergeResult:
    """Merge with at most ``rows`` rows per forward; halved whenever memory runs out.

    ``memory_budget`` is the memory in bytes that the merge may use beyond the model; by default
    ComfyUI's free memory. The node and the report show the resulting plan. Settings that the method
    lacks are ignored; ``thresholds`` holds the thresholds; with ``again`` samples that are kept are
    made again, too; ``rescue`` gets what there is if the user interrupts during the steps; the
    report and, from the first on, the node have what is ``warned`` of; ``base`` are arguments of
    :class:`.comfy_host.ComfyHost`. Raises :class:`IterisError` if the merge cannot fit.
    """
    known = declared_settings(find_method(config.method).settings)
    reading = ReadOptions(allow_partial=config.unmergeable == "skip")
    settings = {**config.settings, "micro_batch": rows}
    settings = {name: value for name, value in settings.items() if name in known}
    samples = store("samples", anew=again)
    progress = NodeProgress(node_id, *([_FINISHED_SAMPLES] if samples is not None else []))
    for about, caution in (warned or {}).items():
        progress(Progress(about, plan=caution))

    def rescued(result: MergeResult) -> None:
        if rescue is not None:
            rescue(result)
            progress.kept = _RESCUED

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
    for about, caution in (warned or {}).items():
        result.report.note(about, caution)
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
    check(config)
    with rows_named(config.concepts):
        return _merged(model, clip, config, request, node_id, low, boundary)


def _merged(
    model: Any,
    clip: Any,
    config: MergeConfig,
    request: Request,
    node_id: str | None,
    low: Any,
    boundary: float | None,
) -> Merge:
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
        note = _WITHOUT_STEPS.format(found.stopped) if found.stopped else _NOTE
        return replace(found, headline=f"{found.headline}\n{note}")
    experts = {} if low is None else {"low": low, "boundary": boundary}
    base: dict[str, Any] = {**request.base, **experts}
    most = {**limits, "memory": limits["memory"] * (_NOISE if memory == "free" else 1)}

    def merge_of(result: MergeResult, *, again: bool = again) -> Merge:
        return Merge.of(replace(result, lora=in_half(result.lora)), most, again=again)

    def rescue(result: MergeResult) -> None:
        """Keep a merge that was interrupted in its steps as what it is, one without steps, and
        where the inputs find it, unless a whole one is there."""
        settings = {name: value for name, value in config.settings.items() if name != "steps"}
        settings |= {} if PRESETS[config.preset].settings.get("steps") == 0 else {"steps": 0}
        without = config.model_copy(update={"settings": settings})
        merge, stopped = merge_of(result, again=False), _stopped(result)
        if stopped or found is None:
            keep(merge, place_of(models, clip, without, request, boundary))
        if stopped and (found is None or found.stopped):
            keep(replace(merge, stopped=stopped), place)

    result = merge_on(
        model,
        clip,
        config,
        node_id,
        memory_budget=memory,
        again=again,
        rescue=None if place is None else rescue,
        warned=cautions(model, request.references.latent, config),
        **base,
    )
    merge = merge_of(result)
    keep(merge, place)
    return merge


def merged_from_files(config: MergeConfig, node_id: str | None) -> Merge:
    """The merge of ``config`` without a MODEL, by a method that looks at weights alone. The LoRAs
    are read for the released model for which they were made."""
    check(config)
    if find_method(config.method).needs_host:
        others = ", ".join(method.name for method in all_methods() if not method.needs_host)
        raise IterisError(
            f"No MODEL is connected, and the method {config.method} runs it. Connect MODEL and "
            f"CLIP, or choose a method that looks at weights alone: {others}."
        )
    reading = ReadOptions(allow_partial=config.unmergeable == "skip")
    warned = about_loras(config.concepts)
    with rows_named(config.concepts), ready_for_merge():
        concepts = [read_concept(concept, None, reading) for concept in config.concepts]
        result = merge_loras(None, concepts, **config.choices, on_progress=NodeProgress(node_id))
    for about, caution in warned.items():
        result.report.note(about, caution)
    return Merge.of(result)


def _stopped(result: MergeResult) -> str:
    """Where the user stopped the steps of a merge; empty if there were none."""
    if not (notes := result.report.notes.get("steps")):
        return ""
    at = re.search(r"stopped after (\d+) of (\d+)", " ".join(notes))
    return f"Stopped at step {at[1]} of {at[2]}" if at else "Stopped before its steps were measured"
