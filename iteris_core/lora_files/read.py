"""Reads a LoRA file of any layout for a base model with known sites."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..architectures import architecture_of_file
from ..architectures.row_mapping import Alias, Piece, file_rows
from ..errors import LoraFileError, SettingsError
from ..linalg.lowrank import extract
from ..lora import Lora, LowRank, concatenate
from .aliases import BaseModel, released_base
from .alphas import adapter_configs, scale_of
from .blocks import check_layers, filtered, weights_by_block
from .embeddings import split_embeddings
from .formulas import Parts, Rebuilt
from .of_weight import needs_weight
from .parts import refusal, split_key
from .rebuild import rebuild
from .tensors import all_finite, file_digest, read_header, read_tensors
from .vectors import vectors_of_file

_NO_MODULE = "matches no module of the base model"

Weight = Callable[[str], Tensor]
"""The base's weight at a site; only called if a change depends on it (DoRA, OFT, GLoRA)."""

_LORA_PART = re.compile(r"lora|lokr|loha|hada_|oft_|alpha|bundle_emb|\.diff(_b)?$|^w[ab]?[12]$")
"""Found in the keys of LoRAs."""
_FEW = 8  # keys; a whole model has more

_TOO_LARGE = 1e30  # limit for an entry of a change, so that sums fit in float32


@dataclass(frozen=True)
class ReadOptions:
    """``allow_partial`` leaves out what cannot be represented instead of refusing the file.

    ``energy`` is the share of ‖ΔW‖² to keep when a change that is not low rank (full differences,
    DoRA, OFT, large LoHa and LoKr) is made low rank. Without ``of_weight``, for inspecting a file
    without its base, DoRA is read as its plain kind, and OFT, BOFT and GLoRA are left out; a note
    says so. Without ``text``, a host for which a text encoder may be missing ignores its changes.
    ``blocks`` and ``layers`` are as in :func:`.blocks.filtered`. With ``vectors``, changes
    of biases and normalisations are read too; a merge does not use them.
    """

    allow_partial: bool = False
    energy: float = 0.999
    of_weight: bool = True
    text: bool = True
    blocks: str = ""
    layers: str = ""
    vectors: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise SettingsError(f"energy must be above 0 and at most 1, not {self.energy}.")
        if self.blocks:
            weights_by_block(self.blocks)
        if self.layers:
            check_layers(self.layers)


Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Renames the keys of a file's tensors."""


def read_lora_file(
    path: Path,
    base: BaseModel,
    weight: Weight | None = None,
    options: ReadOptions | None = None,
    convert: Convert = dict,
) -> Lora:
    """Every change in the file by site, scale folded in, float32.

    Sites whose change is exactly zero are left out. ``convert`` is applied to the tensors before
    names are looked up. Raises :class:`LoraFileError` with file, key and shapes for anything that
    cannot be read in full. Only ``allow_partial`` skips it instead, with a note in
    :attr:`Lora.notes`.
    """
    options = options or ReadOptions()
    tensors, metadata = read_tensors(path)
    embeddings, tensors, missing = split_embeddings(path, tensors, metadata)
    configs = adapter_configs(path, metadata)
    tensors = convert(tensors)
    try:
        lora = lora_of(path, tensors, configs, base, weight, options)
    except LoraFileError as error:
        other = _other_base(tensors, metadata, base)
        if not other:
            raise
        raise LoraFileError(
            f"{path} is a LoRA for {other}, but the base is {base.architecture.title}; give one "
            "that was made for this base."
        ) from error
    notes = [*lora.notes, *missing]
    return replace(lora, metadata=metadata, embeddings=embeddings, notes=notes)


class ReleasedBases:
    """Reads every file for the released model for which it was made, where no base is loaded."""

    @staticmethod
    def read_lora(path: str | Path, options: ReadOptions | None = None) -> Lora:
        """As :func:`read_lora_file`; needs diffusers and transformers."""
        path = Path(path)
        known = released_base(architecture_of_file(*read_header(path)).name)
        try:
            return read_lora_file(path, known, options=options)
        except LoraFileError as error:
            raise LoraFileError(
                f"{error} If it is a DoRA, or its base differs in shape from the released models, "
                "name its base: BASE for merge, option base BASE for others, a host in Python."
            ) from error


def _other_base(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base: BaseModel) -> str:
    """The title of the released model that has all modules in a file, if ``base`` lacks some and is
    of another architecture; otherwise empty."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    with suppress(LoraFileError, ImportError):
        other = released_base(architecture_of_file(shapes, metadata).name)
        splits = (split_key(key, other.aliases) for key in tensors)
        names = {split[0] for split in splits if split is not None}
        differs = other.architecture.name != base.architecture.name
        if differs and names <= other.aliases.keys() and not names <= base.aliases.keys():
            return other.architecture.title
    return ""


def lora_of(
    path: Path,
    tensors: Mapping[str, Tensor],
    configs: Mapping[str, Mapping[str, Any]],
    base: BaseModel,
    weight: Weight | None,
    options: ReadOptions,
) -> Lora:
    """The LoRA from a file's ``tensors``, as in :func:`read_lora_file`; ``configs`` are its
    components' LoraConfigs, which contain alpha if the tensors do not."""
    places = base.vectors if options.vectors else {}
    vectors: dict[str, Tensor] = {}
    for key in places.keys() & tensors.keys():
        vectors |= vectors_of_file(f"{path}: {key}", tensors[key], places[key])
    tensors = {key: tensor for key, tensor in tensors.items() if key not in places}
    groups, left_out = _group(path, tensors, base)
    if left_out and not (options.allow_partial and groups):
        raise LoraFileError(_complaint(path, left_out, len(tensors), len(groups)))
    if not groups:
        raise LoraFileError(f"{path} changes no weight; it is not a LoRA file.")
    counts: Counter[str] = Counter()
    pieces: dict[str, list[tuple[LowRank, float]]] = {}
    for alias, (name, parts) in groups.items():
        place = f"{path}: {name}"
        scale = None
        if "down" in parts and parts["down"].ndim >= 2:
            rank = max(parts["down"].shape[0], 1)
            scale = scale_of(path, configs, alias[0].site, name, rank)
        shape = (file_rows(alias), *base.shapes[alias[0].site][1:])
        if not options.of_weight:
            if needs_weight(parts):
                counts["unseen"] += 1
                continue
            plain = {name: part for name, part in parts.items() if "magnitude" not in name}
            counts["undone"] += plain.keys() != parts.keys()
            parts = plain
        known = partial(_base_weight, alias, shape, weight, place, parts)
        change = rebuild(parts, shape, scale, place, known)
        for piece in alias:
            part = _part_of(change, piece, base.shapes[piece.site], options.energy)
            if part is None:
                counts["zero"] += 1
                continue
            if _largest(part.up) * _largest(part.down) * part.rank > _TOO_LARGE:
                raise LoraFileError(
                    f"{place} contains values whose sums overflow; the file is broken, or its "
                    "training diverged."
                )
            counts["extracted"] += isinstance(change, Tensor)
            scale = 1.0 if isinstance(change, Tensor) else change.scale
            pieces.setdefault(piece.site, []).append((part, scale))
    texts = {
        "extracted": "were not low rank and were extracted at "
        f"{options.energy:.4%} of their energy",
        "undone": "are DoRA; their magnitudes are ignored",
        "unseen": "are OFT, BOFT or GLoRA, which are unknown without the base's weights",
        "zero": "have a change of exactly zero and are left out",
    }
    more = f"{len(vectors)} changes of biases and normalisations, which a merge does not support"
    lora = Lora(
        {
            site: parts[0][0] if len(parts) == 1 else concatenate([change for change, _ in parts])
            for site, parts in pieces.items()
        },
        path.stem,
        source=path.name,
        sha256=file_digest(path),
        base=base,
        scales={
            site: parts[0][1]
            for site, parts in pieces.items()
            if len({scale for _, scale in parts}) == 1
        },
        left_out=len(left_out),
        notes=_left_out(left_out)
        + [f"{counts[kind]} sites {text}" for kind, text in texts.items() if counts[kind]]
        + ([more] if vectors else []),
        reading={"allow_partial": options.allow_partial, "energy": options.energy},
        vectors={name: vector for name, vector in vectors.items() if bool(vector.any())},
    )
    return filtered(lora, options.blocks, options.layers)


def _largest(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.float(), float("inf")))


def _part_of(
    change: Rebuilt, piece: Piece, shape: tuple[int, ...], energy: float
) -> LowRank | None:
    """The rows of ``change`` that belong to ``piece``, as a change of its whole site with a weight
    of ``shape``; None if they are zero."""
    kernel = (shape[2], shape[3]) if len(shape) == 4 else None
    if isinstance(change, Tensor):
        dense = piece.of_file(change)
        if not bool(dense.any()):
            return None
        _check_finite(piece, dense)
        low = extract(dense, energy, kernel)[0]
        up, down = low.up, low.down
    else:
        up, down = piece.of_file(change.up) * change.scale, change.down
        used = up.any(dim=0)  # some ranks of a fused module belong only to other pieces
        if not bool(used.all()):
            up, down = up[:, used], down[used]
    if not bool(up.any()) or not bool(down.any()):
        return None
    _check_finite(piece, up, down)
    around = (0, 0, piece.start, shape[0] - piece.start - piece.length)
    return LowRank(torch.nn.functional.pad(up, around), down, kernel)


def _check_finite(piece: Piece, *tensors: Tensor) -> None:
    if not all(map(all_finite, tensors)):
        raise LoraFileError(
            f"Site {piece.site}: the product of scale and factors overflows float32."
        )


def _group(
    path: Path, tensors: Mapping[str, Tensor], base: BaseModel
) -> tuple[dict[Alias, tuple[str, dict[str, Tensor]]], dict[str, str]]:
    """Parts by module, with the module's name in the file; and unrecognised keys → why."""
    aliases = base.aliases
    groups: dict[Alias, tuple[str, dict[str, Tensor]]] = {}
    left_out: dict[str, str] = {}
    for key, tensor in tensors.items():
        split = split_key(key, aliases)
        if split is None or split[0] not in aliases:
            # Some trainers save zeros as changes of biases and normalisations.
            if not key.endswith((".diff_b", ".lora_B.bias")) or bool(tensor.float().any()):
                left_out[key] = _describe(key, tensor, has_leaf=split is not None)
            continue
        name, part = split
        known, parts = groups.setdefault(aliases[name], (name, {}))
        if name != known and part not in parts:
            raise LoraFileError(
                f"{path}: key {key} is a part of the module that other keys call {known}; use one "
                "name for all parts of a module, because loaders combine only some of them."
            )
        if part in parts:
            raise LoraFileError(
                f"{path}: key {key} duplicates another key of {known}; remove one of them, because "
                "loaders differ in which one they use."
            )
        parts[part] = tensor
    takers: dict[str, list[tuple[Piece, str]]] = {}
    for alias, (name, _) in groups.items():
        for piece in alias:
            for other, known in takers.setdefault(piece.site, []):
                stop = min(piece.start + piece.length, other.start + other.length)
                if max(piece.start, other.start) < stop:
                    raise LoraFileError(
                        f"{path}: {known} and {name} both change {piece.site}; remove one of them, "
                        "because loaders differ in which one they use."
                    )
            takers[piece.site].append((piece, name))
    return groups, left_out


def _describe(key: str, tensor: Tensor, *, has_leaf: bool) -> str:
    what = refusal(key)
    if what is not None:
        what = f"is {what}, which is not supported as a change of a weight"
    else:
        what = _NO_MODULE if has_leaf else "is of an unknown kind"
    return f"{key} {tuple(tensor.shape)} {what}"


def _left_out(what: Mapping[str, str]) -> list[str]:
    """A note for each reason why tensors were left out, with one of them."""
    by_reason: dict[str, list[str]] = {}
    for text in what.values():
        by_reason.setdefault(text.rpartition(") ")[2], []).append(text)
    counts = [(f"{len(some)} tensors, such as " * (len(some) > 1), some[0])
              for some in by_reason.values()]  # fmt: skip
    return [f"left out: {count}{first}" for count, first in counts]


def _complaint(path: Path, left_out: Mapping[str, str], total: int, understood: int) -> str:
    first = "; ".join(list(left_out.values())[:3])
    unknown = [text for text in left_out.values() if text.endswith(_NO_MODULE)]
    plain = not any(_LORA_PART.search(key.lower()) for key in left_out)
    if understood == 0 and plain and len(left_out) > _FEW:
        advice = (
            "This is a whole model (a checkpoint), not a LoRA; give the LoRA's own file, or "
            "extract one from the model first."
        )
    elif understood == 0 and any(map(refusal, left_out)) and not unknown:
        advice = "Nothing in it is a low-rank change of a layer, so there is nothing to merge."
    elif understood == 0:
        advice = "This LoRA was made for another base model, or it is not a LoRA."
    elif len(unknown) == len(left_out):
        advice = (
            "This LoRA was made for another base model, or for one with more parts; to merge the "
            "rest of it, allow a partial reading (option allow_partial)."
        )
    else:
        advice = (
            "Nothing is skipped silently; to merge the rest of it, allow a partial reading "
            "(option allow_partial)."
        )
    return f"{path}: {len(left_out)} of {total} tensors cannot be read: {first}. {advice}"


def _base_weight(
    alias: Alias, shape: tuple[int, ...], weight: Weight | None, place: str, parts: Parts
) -> Tensor:
    """(out, in·kh·kw) of the file's tensor, float32."""
    if weight is None:
        kind = needs_weight(parts) or "a DoRA"
        raise LoraFileError(f"{place} is {kind}, which needs the base model's weights.")
    full = torch.zeros(shape).flatten(1)
    for piece in alias:
        piece.place(weight(piece.site).detach().to("cpu", torch.float32).flatten(1), full)
    return full
