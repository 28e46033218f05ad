"""One merge on a MODEL and CLIP: memory, progress, interrupt, and the LoRA in ComfyUI's form.

Merges are cached: another strength, another name or one more method to compare does not run them
again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import folder_paths
import torch
from torch import Tensor

from ..iteris_core.concepts import Calibration
from ..iteris_core.config import ConceptConfig, MergeConfig, read_concept
from ..iteris_core.errors import IterisError, OutOfMemory
from ..iteris_core.hosts.sample_store import SampleStore
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions, to_tensors
from ..iteris_core.lora_files.embeddings import bundled
from ..iteris_core.lora_files.experts import split_experts
from ..iteris_core.lora_files.tensors import content_hash
from ..iteris_core.merge import MergeResult, merge_loras
from ..iteris_core.methods import find_method
from ..iteris_core.report.provenance import cut_lora, is_ordered
from ..iteris_core.settings import declared_settings
from ..iteris_core.solve.choose import THRESHOLDS, Thresholds
from .comfy_conds import References, Same
from .comfy_host import ComfyHost
from .comfy_runtime import NodeProgress
from .comfy_sampling import ComfySamples
from .comfy_state import ready_for_merge
from .concept_specs import DENOISER
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
            self.metadata["modelspec.hash_sha256"] = "0x" + content_hash(tensors)
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
    with ready_for_merge(clip), _RememberingHost(model, clip, rows, **base) as host:
        host.recipe = tuple(
            concept.model_copy(update={"weight": float(concept.weight > 0), "source": ""})
            for concept in config.concepts
        )  # what rows depend on; weights only matter in the solve
        try:
            result = merge_loras(
                host,
                [read_concept(concept, host, reading) for concept in config.concepts],
                **{**config.choices, "settings": settings},
                on_progress=NodeProgress(node_id),
                memory_budget=memory_budget,
                thresholds=thresholds,
                store=SampleStore(Path(folder_paths.get_user_directory(), "iteris", "samples")),
            )
        except OutOfMemory as error:  # the node has an input in pixels
            raise OutOfMemory(str(error).replace("latent_size", "image_size")) from error
    _log.info("IterIS: merged with %s on %d rows", config.method, result.report.rows)
    return result


def as_lora_model(result: MergeResult, dtype: str = "float16") -> LoraModel:
    """``result`` as if saved and reloaded, with its embeddings included."""
    lora, ordered = result.lora, is_ordered(result.report)
    try:
        return LoraModel(lora, dtype, ordered=ordered)
    except IterisError:  # for values that do not fit in half precision
        return LoraModel(lora, "float32", ordered=ordered)


def as_lora_models(result: MergeResult, dtype: str = "float16") -> list[LoraModel]:
    """The LoRAs for the models for high and low noise."""
    parts = split_experts(result.lora, DENOISER)
    return [as_lora_model(replace(result, lora=part), dtype) for part in parts]


class _RememberingHost(ComfyHost):
    """Caches the last rows, those of the fit and those held out of it, so that another rank or
    ridge does not denoise again."""

    _last: Sequence[tuple[Any, ComfySamples]] = ()
    recipe: tuple[ConceptConfig, ...] = ()

    def samples(
        self,
        concepts: Any,
        sites: Set[str],
        calibration: Calibration,
        lockstep: Any,
        *rest: Any,
        **more: Any,
    ) -> ComfySamples:
        # The objects themselves: clones share weights, but not wrappers, hooks or sampling shift.
        key = (
            *_key_of((self.model, self.clip, self.low), self.references, self._forget),
            (self.boundary, self.distilled),
            self.recipe,
            asdict(calibration),
            frozenset(sites),
        )
        self._lockstep = lockstep
        if calibration.latents == "noise":  # made immediately
            return super().samples(concepts, sites, calibration, lockstep, *rest, **more)
        last = _RememberingHost._last
        samples = next((samples for known, samples in last if known == key), None)
        if samples is None:
            _log.info("IterIS: making latents")
            samples = super().samples(concepts, sites, calibration, lockstep, *rest, **more)
            _RememberingHost._last = [*last, (key, samples)][-2:]
        return samples

    @staticmethod
    def _forget(_: Any) -> None:
        """The MODEL or CLIP was deleted, so its rows are useless."""
        _RememberingHost._last = ()


_MOST = 2 * 2**30
"""Bytes of merged LoRAs to cache in host memory; the last one is always kept."""

_kept: list[tuple[Any, MergeResult]] = []


def merged(
    model: Any,
    clip: Any,
    config: MergeConfig,
    request: Request,
    node_id: str | None,
    **experts: Any,
) -> MergeResult:
    """The merge of ``config``, perhaps cached; ``experts`` as in :func:`.merging.merge_on`."""
    key = (
        *_key_of((model, clip, experts.get("low")), request.references, _forget),
        (config, experts.get("boundary"), request.distilled, request.memory_budget),
    )
    for kept, result in _kept:
        if kept == key:
            return result
    memory, base = request.memory_budget, {**request.base, **experts}
    result = merge_on(model, clip, config, node_id, memory_budget=memory, **base)
    _kept.insert(0, (key, result))
    while sum(_bytes(kept.lora) for _, kept in _kept) > _MOST and len(_kept) > 1:
        _kept.pop()
    return result


def _key_of(
    parts: Sequence[Any], references: References, forget: Callable[[Any], None]
) -> tuple[Any, ...]:
    """A key, equal for the same MODELs, CLIPs and references with the same patches."""
    parts = [part for part in parts if part is not None]
    patches = [getattr(part, "patcher", part).patches_uuid for part in parts]
    return [Same(part, forget) for part in parts], patches, references.key(forget)


def forget() -> None:
    _kept.clear()


def _forget(_: Any) -> None:
    """Drop the merges on a deleted MODEL or CLIP."""
    _kept[:] = [(key, result) for key, result in _kept if all(part == part for part in key[0])]


def _bytes(lora: Lora) -> int:
    return sum(change.up.nbytes + change.down.nbytes for change in lora.sites.values())
