"""A cache of merges: another strength, another name or one more method to compare does not run
them again."""

from __future__ import annotations

from typing import Any

from ..iteris_core.config import MergeConfig
from ..iteris_core.lora import Lora
from ..iteris_core.merge import MergeResult
from .comfy_conds import Same
from .merge_settings import Request
from .merging import merge_on

_MOST = 2 * 2**30
"""Bytes of merged LoRAs that are kept, in host memory; the last one is, however large."""

_kept: list[tuple[Any, MergeResult]] = []


def merged(
    model: Any,
    clip: Any,
    config: MergeConfig,
    request: Request,
    node_id: str | None,
    **experts: Any,
) -> MergeResult:
    """The merge of ``config``, from the cache if it is there; ``experts`` as in
    :func:`.merging.merge_on`."""
    parts = [part for part in (model, clip, experts.get("low")) if part is not None]
    key = (
        [Same(part, _forget) for part in parts],
        [getattr(part, "patcher", part).patches_uuid for part in parts],
        request.references.key(_forget),
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


def forget() -> None:
    _kept.clear()


def _forget(_: Any) -> None:
    """Drop the merges on a MODEL or CLIP that is gone."""
    _kept[:] = [(key, result) for key, result in _kept if all(part == part for part in key[0])]


def _bytes(lora: Lora) -> int:
    factors = [factor for change in lora.sites.values() for factor in (change.up, change.down)]
    return sum(factor.numel() * factor.element_size() for factor in factors)
