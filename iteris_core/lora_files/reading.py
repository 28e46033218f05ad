"""Read a LoRA file of any layout for a base model whose sites are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bases import Base
from ..errors import IterisError, LoraFileError, SettingsError
from ..linalg.lowrank import extract
from ..lora import Lora, LowRank
from .configs import adapter_configs, configured_scale
from .dora import fold_magnitude
from .embeddings import split_embeddings
from .mmdit_names import Alias
from .names import all_aliases
from .parts import refusal, split_key
from .rebuild import Rebuilt, rebuild
from .tensors import all_finite, file_digest, read_tensors

Weight = Callable[[str], Tensor]
"""The base's weight of a site; asked for only where a LoRA is a DoRA."""


@dataclass(frozen=True)
class ReadOptions:
    """``allow_partial`` leaves out what cannot be represented instead of refusing the file.

    ``energy`` is the share of ‖ΔW‖² that is kept of a change that is not low rank by itself (full
    differences, DoRA, large LoHa and LoKr), when it is made low rank. Without ``magnitudes`` a DoRA
    is read as if it were none, to look at it without the base model's weights; a note says so.
    """

    allow_partial: bool = False
    energy: float = 0.999
    magnitudes: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise SettingsError(f"energy must be above 0 and at most 1, not {self.energy}.")


def read_lora_file(
    path: Path, base: Base, weight: Weight | None = None, options: ReadOptions | None = None
) -> Lora:
    """Every change in the file by site, scale folded in, float32.

    Sites whose change is exactly zero are left out, since they change nothing. Raises
    :class:`LoraFileError` naming file, key and shapes for whatever cannot be read in full;
    nothing is skipped without ``allow_partial``, and then it stands in :attr:`Lora.notes`.
    """
    options = options or ReadOptions()
    tensors, metadata = read_tensors(path)
    embeddings, tensors = split_embeddings(path, tensors)
    groups, left_out = _group(path, tensors, base)
    if left_out and not options.allow_partial:
        raise LoraFileError(_complaint(path, left_out, len(tensors), len(groups)))
    if not groups:
        raise LoraFileError(
            _complaint(path, left_out, len(tensors), 0)
            if left_out
            else f"{path} changes no weight; it is not a LoRA file."
        )
    configs = adapter_configs(path, metadata)
    found = _Found({}, {}, Counter(), [f"left out: {what}" for what in left_out.values()])
    for alias, (name, parts) in groups.items():
        place = f"{path}: {name}"
        scale = _configured(path, configs, alias, parts)
        shape = _shape(alias, base)
        change = rebuild(parts, shape, scale, place)
        magnitude = "magnitude" in parts or "output_magnitude" in parts
        found.counts["undone"] += magnitude and not options.magnitudes
        if magnitude and options.magnitudes:
            if weight is None:
                raise LoraFileError(f"{place} is a DoRA, which needs the base model's weights.")
            dense = _base_weight(alias, shape, weight)
            folded = fold_magnitude(change.matrix(), dense, parts, place)
            change = Rebuilt(1.0, dense=folded)
        for piece in alias:
            _add(found, piece.site, piece.rows, change, base.shapes[piece.site], options)
    return Lora(
        found.sites,
        path.stem,
        metadata,
        path.name,
        file_digest(path),
        base,
        found.scales,
        found.all_notes(options),
        embeddings,
        {"allow_partial": options.allow_partial, "energy": options.energy},
    )


@dataclass
class _Found:
    sites: dict[str, LowRank]
    scales: dict[str, float]
    counts: Counter[str]
    notes: list[str]

    def all_notes(self, options: ReadOptions) -> list[str]:
        texts = {
            "zero": "{} sites have a change of exactly zero and are left out: they change nothing",
            "extracted": f"{{}} sites were not low rank and were extracted at {options.energy:.4%} "
            "of their energy",
        }
        texts["undone"] = "{} sites are DoRA, of which the magnitudes are not looked at"
        return self.notes + [texts[k].format(n) for k, n in sorted(self.counts.items()) if n]


def _group(
    path: Path, tensors: Mapping[str, Tensor], base: Base
) -> tuple[dict[Alias, tuple[str, dict[str, Tensor]]], dict[str, str]]:
    """Parts by module, with its name in the file, and what is not understood: key → why."""
    aliases = all_aliases(base)
    groups: dict[Alias, tuple[str, dict[str, Tensor]]] = {}
    left_out: dict[str, str] = {}
    for key, tensor in tensors.items():
        split = split_key(key, aliases)
        if split is None or split[0] not in aliases:
            if not _is_nothing(key, tensor):
                left_out[key] = _describe(key, tensor, split)
            continue
        name, part = split
        known, parts = groups.setdefault(aliases[name], (name, {}))
        if name != known and part not in parts:
            raise LoraFileError(
                f"{path}: key {key} is a part of what other keys call {known}; give all parts of a "
                "module one name, since loaders take only some of them together."
            )
        if part in parts:
            raise LoraFileError(
                f"{path}: key {key} says again what another key says of {known}; remove one of "
                "them, since loaders differ in which they take."
            )
        parts[part] = tensor
    owners: dict[str, str] = {}
    for alias, (name, _) in groups.items():
        for piece in alias:
            if piece.site in owners:
                raise LoraFileError(
                    f"{path}: {owners[piece.site]} and {name} both change {piece.site}; remove one "
                    "of them, since loaders differ in which they take."
                )
            owners[piece.site] = name
    return groups, left_out


def _is_nothing(key: str, tensor: Tensor) -> bool:
    """A change of a bias or normalisation that is all zeros, as some trainers save."""
    return key.endswith((".diff_b", ".lora_B.bias")) and not bool(tensor.float().any())


def _describe(key: str, tensor: Tensor, split: tuple[str, str] | None) -> str:
    shape = tuple(tensor.shape)
    what = refusal(key)
    if what is not None:
        return f"{key} {shape} is {what}, which a LoRA cannot represent"
    if split is None:
        return f"{key} {shape} is of no kind that is known here"
    return f"{key} {shape} matches no module of the base model"


def _complaint(path: Path, left_out: Mapping[str, str], total: int, understood: int) -> str:
    first = "; ".join(list(left_out.values())[:3])
    if understood == 0:
        advice = "This LoRA was made for another base model, or it is not a LoRA."
    elif all(text.endswith("matches no module of the base model") for text in left_out.values()):
        advice = (
            "This LoRA was made for another base model, or for one with more parts than yours; "
            "to merge the rest of it, allow a partial reading."
        )
    else:
        advice = "Nothing is skipped silently; to merge the rest of it, allow a partial reading."
    return f"{path}: {len(left_out)} of {total} tensors cannot be read: {first}. {advice}"


def _configured(
    path: Path, configs: Mapping[str, dict[str, Any]], alias: Alias, parts: Mapping[str, Tensor]
) -> float | None:
    component, _, module = alias[0].site.partition(".")
    config = configs.get(component, configs.get(""))
    if config is None or "down" not in parts or parts["down"].ndim < 2:
        return None
    return configured_scale(path, config, module, max(parts["down"].shape[0], 1))


def _shape(alias: Alias, base: Base) -> tuple[int, ...]:
    """Shape of the whole weight that the pieces are rows of."""
    rows = max(stop for piece in alias for _, stop in piece.rows)
    return (rows, *base.shapes[alias[0].site][1:])


def _base_weight(alias: Alias, shape: tuple[int, ...], weight: Weight) -> Tensor:
    """(out, in·kh·kw), float32"""
    full = torch.zeros(shape).flatten(1)
    for piece in alias:
        own = weight(piece.site).detach().to("cpu", torch.float32).flatten(1)
        start = 0
        for first, stop in piece.rows:
            full[first:stop] = own[start : start + stop - first]
            start += stop - first
    return full


def _add(
    found: _Found,
    site: str,
    rows: tuple[tuple[int, int], ...],
    change: Rebuilt,
    shape: tuple[int, ...],
    options: ReadOptions,
) -> None:
    kernel = (shape[2], shape[3]) if len(shape) == 4 else None

    def take(matrix: Tensor) -> Tensor:
        return torch.cat([matrix[start:stop] for start, stop in rows])

    if change.up is not None and change.down is not None:
        low = _without_zeros(take(change.up) * change.scale, change.down, kernel)
        zero = not bool(low.up.any()) or not bool(low.down.any())
    else:
        assert change.dense is not None
        dense = take(change.dense) * change.scale
        zero = not bool(dense.any())
        low = None if zero else extract(dense, options.energy, kernel)[0]
        found.counts["extracted"] += not zero
    if zero or low is None:
        found.counts["zero"] += 1
        return
    if not (all_finite(low.up) and all_finite(low.down)):
        raise IterisError(f"Site {site}: scale and factors multiply to more than float32 holds.")
    found.sites[site] = low
    if change.up is not None and change.scale != 1.0:
        found.scales[site] = change.scale


def _without_zeros(up: Tensor, down: Tensor, kernel: tuple[int, int] | None) -> LowRank:
    """Without the ranks that are zero here: of a fused module those of the other pieces."""
    used = up.any(dim=0)
    if not bool(used.all()):
        up, down = up[:, used], down[used]
    return LowRank(up, down, kernel)
