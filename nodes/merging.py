"""One merge on a MODEL and CLIP: memory, progress, interrupt, and the LoRA in ComfyUI's form."""

from __future__ import annotations

import logging
import weakref
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
from ..iteris_core.settings import declared_settings
from ..iteris_core.solve.choose import THRESHOLDS, Thresholds
from .comfy_conds import References
from .comfy_host import ComfyHost
from .comfy_runtime import NodeProgress
from .comfy_state import ready_for_merge
from .concept_specs import DENOISER
from .kept import Merge, keep, kept, key_on_disk, store
from .merge_settings import Request

_ROWS = 32
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
    **base: Any,
) -> MergeResult:
    """Merge with at most ``rows`` rows per forward; halved whenever memory runs out.

    ``memory_budget`` is the memory in bytes that the merge may use beyond the model; by default
    ComfyUI's free memory. The node and the report show the resulting plan. Settings that the method
    lacks are ignored; ``thresholds`` holds the thresholds; ``base`` are arguments of
    :class:`.comfy_host.ComfyHost`. Raises :class:`IterisError` if the merge cannot fit.
    """
    known = declared_settings(find_method(config.method).settings)
    reading = ReadOptions(allow_partial=config.unmergeable == "skip")
    settings = {**config.settings, "micro_batch": rows}
    settings = {name: value for name, value in settings.items() if name in known}
    with ready_for_merge(clip), ComfyHost(model, clip, rows, **base) as host:
        try:
            result = merge_loras(
                host,
                [read_concept(concept, host, reading) for concept in config.concepts],
                **{**config.choices, "settings": settings},
                on_progress=NodeProgress(node_id),
                memory_budget=memory_budget,
                thresholds=thresholds,
                store=store("samples"),
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


_last: list[tuple[Any, Merge]] = []
"""The last merge on a MODEL and CLIP without a hash, and what it was made of."""


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
    models = [model] if low is None else [model, low]
    key = key_on_disk(models, clip, config, request, boundary)
    parts = [weakref.ref(part) for part in (*models, clip) if part is not None]
    made_of = parts, config, boundary, request.distilled, request.memory_budget
    if key is not None:
        if (merge := kept(key, model, clip)) is not None:
            return merge
    elif _last and _last[0][0] == made_of and request.references == References():
        return _last[0][1]
    experts = {} if low is None else {"low": low, "boundary": boundary}
    memory, base = request.memory_budget, {**request.base, **experts}
    merge = Merge.of(merge_on(model, clip, config, node_id, memory_budget=memory, **base))
    if key is not None:
        keep(merge, key)
    elif request.references == References():
        _last[:] = [(made_of, merge)]
    return merge


def clear() -> None:
    """Remove all merges and samples that are kept."""
    _last.clear()
    for what in ("merges", "samples"):
        store(what).clear()
