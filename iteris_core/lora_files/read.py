"""Read a LoRA file of any layout for a base model whose sites are known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures.pieces import Alias, Piece, file_rows
from ..errors import IterisError, LoraFileError, SettingsError
from ..linalg.lowrank import extract
from ..lora import Lora, LowRank, concatenate
from .aliases import BaseModel
from .alphas import adapter_configs, scale_of
from .dora import fold_magnitude
from .embeddings import split_embeddings
from .parts import refusal, split_key
from .rebuild import Dense, Factors, Rebuilt, rebuild
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


Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""The tensors of a file, by key, under other keys."""


def read_lora_file(
    path: Path,
    base: BaseModel,
    weight: Weight | None = None,
    options: ReadOptions | None = None,
    convert: Convert = dict,
) -> Lora:
    """Every change in the file by site, scale folded in, float32.

    Sites whose change is exactly zero are left out, since they change nothing. ``convert`` is
    called on the tensors before any name is looked up. Raises :class:`LoraFileError` naming file,
    key and shapes for whatever cannot be read in full; nothing is skipped without
    ``allow_partial``, and then it stands in :attr:`Lora.notes`.
    """
    options = options or ReadOptions()
    tensors, metadata = read_tensors(path)
    embeddings, tensors = split_embeddings(path, tensors)
    configs = adapter_configs(path, metadata)
    lora = lora_of(path, convert(tensors), configs, base, weight, options)
    return replace(lora, metadata=metadata, embeddings=embeddings)


def lora_of(
    path: Path,
    tensors: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    base: BaseModel,
    weight: Weight | None,
    options: ReadOptions,
) -> Lora:
    """What :func:`read_lora_file` makes of the ``tensors`` of a file; ``configs`` are the
    LoraConfigs of its components, where alpha stands if it is not among the tensors."""
    groups, left_out = _group(path, tensors, base)
    if left_out and not options.allow_partial:
        raise LoraFileError(_complaint(path, left_out, len(tensors), len(groups)))
    if not groups:
        raise LoraFileError(
            _complaint(path, left_out, len(tensors), 0)
            if left_out
            else f"{path} changes no weight; it is not a LoRA file."
        )
    changes = _Changes(base, options)
    for alias, (name, parts) in groups.items():
        place = f"{path}: {name}"
        scale = None
        if "down" in parts and parts["down"].ndim >= 2:
            rank = max(parts["down"].shape[0], 1)
            scale = scale_of(path, configs, alias[0].site, name, rank)
        shape = (file_rows(alias), *base.shapes[alias[0].site][1:])
        change = rebuild(parts, shape, scale, place)
        if "magnitude" in parts or "output_magnitude" in parts:
            if not options.magnitudes:
                changes.counts["undone"] += 1
            elif weight is None:
                raise LoraFileError(f"{place} is a DoRA, which needs the base model's weights.")
            else:
                dense = _base_weight(alias, shape, weight)
                change = Dense(fold_magnitude(change.matrix(), dense, parts, place))
        for piece in alias:
            changes.add(piece, change)
    return Lora(
        changes.sites(),
        path.stem,
        source=path.name,
        sha256=file_digest(path),
        base=base,
        scales=changes.scales(),
        notes=[f"left out: {what}" for what in left_out.values()] + changes.notes(),
        reading={"allow_partial": options.allow_partial, "energy": options.energy},
    )


class _Changes:
    """The changes of sites as they are read, piece by piece."""

    def __init__(self, base: BaseModel, options: ReadOptions) -> None:
        self.counts: Counter[str] = Counter()
        self._base, self._options = base, options
        self._pieces: dict[str, list[tuple[LowRank, float]]] = {}

    def sites(self) -> dict[str, LowRank]:
        """Every site's change: of one piece, or the sum of several that are rows of it."""
        return {
            site: pieces[0][0] if len(pieces) == 1 else concatenate([c for c, _ in pieces])
            for site, pieces in self._pieces.items()
        }

    def scales(self) -> dict[str, float]:
        """What was folded into ``up``, where that is one factor other than 1 for the whole site."""
        scales: dict[str, float] = {}
        for site, pieces in self._pieces.items():
            first = pieces[0][1]
            if first != 1.0 and all(scale == first for _, scale in pieces):
                scales[site] = first
        return scales

    def notes(self) -> list[str]:
        """What was done beyond taking the file as it is."""
        texts = {
            "zero": "{} sites have a change of exactly zero and are left out: they change nothing",
            "extracted": "{} sites were not low rank and were extracted at "
            f"{self._options.energy:.4%} of their energy",
            "undone": "{} sites are DoRA, of which the magnitudes are not looked at",
        }
        return [texts[kind].format(n) for kind, n in sorted(self.counts.items()) if n]

    def add(self, piece: Piece, change: Rebuilt) -> None:
        """The rows of ``change`` that are ``piece``; nothing where they are zero."""
        shape = self._base.shapes[piece.site]
        kernel = (shape[2], shape[3]) if len(shape) == 4 else None
        scale = 1.0
        if isinstance(change, Factors):
            scale = change.scale
            low = _without_zeros(piece.of_file(change.up) * scale, change.down, kernel)
        else:
            dense = piece.of_file(change.change)
            if not bool(dense.any()):
                self.counts["zero"] += 1
                return
            low = extract(dense, self._options.energy, kernel)[0]
            self.counts["extracted"] += 1
        if not bool(low.up.any()) or not bool(low.down.any()):
            self.counts["zero"] += 1
            return
        if not (all_finite(low.up) and all_finite(low.down)):
            raise IterisError(
                f"Site {piece.site}: scale and factors multiply to more than float32 holds."
            )
        if piece.length < shape[0]:
            below = shape[0] - piece.start - piece.length
            up = torch.nn.functional.pad(low.up, (0, 0, piece.start, below))
            low = LowRank(up, low.down, kernel)
        self._pieces.setdefault(piece.site, []).append((low, scale))


def _group(
    path: Path, tensors: Mapping[str, Tensor], base: BaseModel
) -> tuple[dict[Alias, tuple[str, dict[str, Tensor]]], dict[str, str]]:
    """Parts by module, with its name in the file, and what is not understood: key → why."""
    aliases = base.aliases
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
    takers: dict[str, list[tuple[Piece, str]]] = {}
    for alias, (name, _) in groups.items():
        for piece in alias:
            for other, known in takers.setdefault(piece.site, []):
                if piece.start < other.start + other.length and (
                    other.start < piece.start + piece.length
                ):
                    raise LoraFileError(
                        f"{path}: {known} and {name} both change {piece.site}; remove one of them, "
                        "since loaders differ in which they take."
                    )
            takers[piece.site].append((piece, name))
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


def _base_weight(alias: Alias, shape: tuple[int, ...], weight: Weight) -> Tensor:
    """(out, in·kh·kw) of the file's tensor, float32."""
    full = torch.zeros(shape).flatten(1)
    for piece in alias:
        piece.place(weight(piece.site).detach().to("cpu", torch.float32).flatten(1), full)
    return full


def _without_zeros(up: Tensor, down: Tensor, kernel: tuple[int, int] | None) -> LowRank:
    """Without the ranks that are zero here: of a fused module those of the other pieces."""
    used = up.any(dim=0)
    if not bool(used.all()):
        up, down = up[:, used], down[used]
    return LowRank(up, down, kernel)
