"""Merges that were made, kept: another strength, another name or one more method to compare with
does not make them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..iteris_core.lora import Lora
from ..iteris_core.merge import MergeResult
from .comfy_conds import Same
from .concept_specs import ConceptSpec
from .merge_settings import Asked
from .merging import merge_on

_MOST = 2 * 2**30
"""Bytes of merged LoRAs that are kept, in host memory; the last one is, however large."""

_kept: list[tuple[Any, MergeResult]] = []


def merged(
    model: Any,
    clip: Any,
    specs: Sequence[ConceptSpec],
    method: str,
    asked: Asked,
    node_id: str | None,
    **experts: Any,
) -> MergeResult:
    """The merge that is asked for, made unless it was; ``experts`` as :func:`.merging.merge_on`."""
    parts = [part for part in (model, clip, experts.get("low")) if part is not None]
    calibration, settings = asked.calibration, asked.settings(method)
    key = (
        [Same(part, _forget) for part in parts],
        [getattr(part, "patcher", part).patches_uuid for part in parts],
        asked.references.key(_forget),
        (tuple(specs), method, settings, calibration, experts.get("boundary")),
        (asked.distilled, asked.unmergeable, asked.memory_budget),
    )
    for kept, result in _kept:
        if kept == key:
            return result
    result = merge_on(
        model, clip, specs, method, settings, calibration, node_id, **asked.options, **experts
    )
    _kept.insert(0, (key, result))
    while sum(_bytes(kept.lora) for _, kept in _kept) > _MOST and len(_kept) > 1:
        _kept.pop()
    return result


def forget() -> None:
    _kept.clear()


def _forget(_: Any) -> None:
    """A MODEL or CLIP is gone; merges on it cannot be asked for again."""
    _kept[:] = [(key, result) for key, result in _kept if all(part == part for part in key[0])]


def _bytes(lora: Lora) -> int:
    factors = [factor for change in lora.sites.values() for factor in (change.up, change.down)]
    return sum(factor.numel() * factor.element_size() for factor in factors)
