"""Reads a LoRA file of any layout for a base model with known sites."""

from __future__ import annotations

import math
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
from ..architectures.record import Alias, BaseModel, Piece, file_rows
from ..errors import LoraFileError, SettingsError
from ..linalg import extract
from ..lora import Lora, LowRank, concatenate
from .aliases import released_base
from .blocks import check_layers, filtered, weights_by_block
from .embeddings import split_embeddings
from .factors import adapter_configs, scale_of
from .formulas import Rebuilt, rebuild
from .tensors import file_digest, read_header, read_tensors, refusal, split_key

_NO_MODULE, _UNKNOWN = "matches no module of the base model", "is of an unknown kind"

Weight = Callable[[str], Tensor]
"""The base's weight at a site; only called for a DoRA."""

_TOO_LARGE = 1e30  # limit for an entry of a change, so that sums fit in float32


@dataclass(frozen=True)
class ReadOptions:
    """``allow_partial`` leaves out what cannot be represented instead of refusing the file.

    ``energy`` is the share of ‖ΔW‖² to keep when a change that is not low rank (full differences,
    DoRA, large LoHa and LoKr) is made low rank. Without ``of_weight``, for inspecting a file
    without its base, DoRA is read as its plain kind; a note says so. Without ``text``, a host for
    which a text encoder may be missing ignores its changes. ``blocks`` and ``layers`` are as in
    :func:`.blocks.filtered`.
    """

    allow_partial: bool = False
    energy: float = 0.999
    of_weight: bool = True
    text: bool = True
    blocks: str = ""
    layers: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.energy <= 1:
            raise SettingsError(f"energy must be above 0 and at most 1, not {self.energy}.")
        if self.blocks:
            weights_by_block(self.blocks)
        if self.layers:
            check_layers(self.layers)


def read_lora_file(
    path: Path,
    base: BaseModel,
    weight: Weight | None = None,
    options: ReadOptions | None = None,
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> Lora:
    """Every change in the file ``path`` by site of ``base``, scale folded in, float32.

    ``weight(site)`` is the base's weight, which some formulas need. Sites whose change is exactly
    zero are left out. ``options`` say which part is read; ``convert`` renames the tensors first.
    Raises :class:`LoraFileError` with file, key and shapes for anything that cannot be read in
    full. Only ``allow_partial`` skips it instead, with a note in :attr:`Lora.notes`.
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


def read_for_released(path: str | Path, options: ReadOptions | None = None) -> Lora:
    """As :func:`read_lora_file`, for the released model for which the file was made, where no base
    is loaded; needs diffusers and transformers."""
    path = Path(path)
    base = released_base(architecture_of_file(*read_header(path)).name)
    try:
        return read_lora_file(path, base, options=options)
    except LoraFileError as error:
        raise LoraFileError(
            f"{error} If it is a DoRA, or its base differs in shape from the released models, "
            "give its base (option base)."
        ) from error


def _other_base(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base: BaseModel) -> str:
    """The title of a released model that has all modules in a file, if ``base`` lacks some."""
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
    modules, left_out = _modules(path, tensors, base)
    if left_out and not (options.allow_partial and modules):
        raise LoraFileError(f"{path}: {_complaint(left_out, tensors, whole=not modules)}")
    if not modules:
        raise LoraFileError(f"{path} changes no weight; it is not a LoRA file.")
    counts: Counter[str] = Counter()
    taken: dict[str, list[tuple[int, int, str]]] = {}  # rows of a site, and who changes them
    pieces: dict[str, list[LowRank]] = {}
    for alias, (name, parts) in modules.items():
        place = f"{path}: {name}"
        scale = None
        if "down" in parts and parts["down"].ndim >= 2:
            rank = max(parts["down"].shape[0], 1)
            scale = scale_of(path, configs, alias[0].site, name, rank)
        shape = (file_rows(alias), *base.shapes[alias[0].site][1:])
        if not options.of_weight:
            plain = {name: part for name, part in parts.items() if "magnitude" not in name}
            counts["undone"] += plain.keys() != parts.keys()
            parts = plain
        of_base = partial(_base_weight, alias, shape, weight, place)
        change = rebuild(parts, shape, scale, place, of_base)
        for piece in alias:
            start, stop = piece.start, piece.start + piece.length
            others = taken.setdefault(piece.site, [])
            if known := next((n for a, b, n in others if a < stop and start < b), None):
                raise LoraFileError(
                    f"{path}: {known} and {name} both change {piece.site}; remove one of them, "
                    "because loaders differ in which one they use."
                )
            others.append((start, stop, name))
            part = _part_of(change, piece, base.shapes[piece.site], options.energy, place)
            if part is None:
                counts["zero"] += 1
                continue
            counts["extracted"] += isinstance(change, Tensor)
            pieces.setdefault(piece.site, []).append(part)
    texts = {
        "extracted": "were not low rank and were extracted at "
        f"{options.energy:.4%} of their energy",
        "undone": "are DoRA; their magnitudes are ignored",
        "zero": "have a change of exactly zero and are left out",
    }
    notes = [
        f"left out: {f'{len(keys)} tensors, such as ' * (len(keys) > 1)}"
        f"{keys[0]} {tuple(tensors[keys[0]].shape)} {why}"
        for why, keys in left_out.items()
    ]
    notes += [f"{counts[kind]} sites {text}" for kind, text in texts.items() if counts[kind]]
    lora = Lora(
        {site: concatenate(parts) for site, parts in pieces.items()},
        path.stem,
        source=path.name,
        sha256=file_digest(path),
        base=base,
        left_out=sum(map(len, left_out.values())),
        notes=notes,
        reading={"allow_partial": options.allow_partial, "energy": options.energy},
    )
    return filtered(lora, options.blocks, options.layers)


def _part_of(
    change: Rebuilt, piece: Piece, shape: tuple[int, ...], energy: float, place: str
) -> LowRank | None:
    """The rows of ``change`` that belong to ``piece``, as a change of its whole site with a weight
    of ``shape``; None if they are zero."""
    kernel = (shape[2], shape[3]) if len(shape) == 4 else None
    if isinstance(change, Tensor):
        dense = piece.of_file(change)
        if not bool(dense.any()):
            return None
        _check_size(place, 1, dense)
        change = extract(dense, energy)
        up, down = change.up, change.down
    else:
        up, down = piece.of_file(change.up), change.down
        used = up.any(dim=0)  # some ranks of a fused module belong only to other pieces
        if not bool(used.all()):
            up, down = up[:, used], down[used]
    if not bool(up.any()) or not bool(down.any()):
        return None
    _check_size(place, up.shape[1], up, down)
    around = (0, 0, piece.start, shape[0] - piece.start - piece.length)
    return LowRank(torch.nn.functional.pad(up, around), down, kernel, change.scale)


def _check_size(place: str, rank: int, *factors: Tensor) -> None:
    largest = (torch.linalg.vector_norm(factor.float(), float("inf")) for factor in factors)
    if not rank * math.prod(map(float, largest)) <= _TOO_LARGE:  # which a NaN is not either
        raise LoraFileError(
            f"{place}: its change overflows float32; the file is broken, or its training diverged."
        )


def _modules(
    path: Path, tensors: Mapping[str, Tensor], base: BaseModel
) -> tuple[dict[Alias, tuple[str, dict[str, Tensor]]], dict[str, list[str]]]:
    """Parts by module, with its name in the file; and why keys are not recognised → these keys."""
    modules: dict[Alias, tuple[str, dict[str, Tensor]]] = {}
    left_out: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        name, part = split_key(key, base.aliases) or ("", "")
        if name not in base.aliases:
            # Some trainers save zeros as changes of biases and normalisations.
            if not key.endswith((".diff_b", ".lora_B.bias")) or bool(tensor.float().any()):
                what, known = refusal(key), _NO_MODULE if part else _UNKNOWN
                why = f"is {what}, which is not supported as a change of a weight"
                left_out.setdefault(why if what else known, []).append(key)
            continue
        known, parts = modules.setdefault(base.aliases[name], (name, {}))
        if name != known or part in parts:
            raise LoraFileError(
                f"{path}: key {key} is a part of the module that other keys call {known}; give "
                "every part of a module once and under one name, because loaders differ in which "
                "ones they use."
            )
        parts[part] = tensor
    return modules, left_out


def _complaint(
    left_out: Mapping[str, list[str]], tensors: Mapping[str, Tensor], *, whole: bool
) -> str:
    """What is left out, and what to do; ``whole``: that is all of the file."""
    reasons = [(key, why) for why, keys in left_out.items() for key in keys]
    rest = "To merge the rest, use option allow_partial."
    if whole and _NO_MODULE not in left_out and left_out.keys() - {_UNKNOWN}:
        advice = "Nothing in it is a low-rank change of a layer, so there is nothing to merge."
    elif whole:
        advice = "This LoRA was made for another base model, or it is not a LoRA."
    elif set(left_out) == {_NO_MODULE}:
        return (
            f"{len(reasons)} of {len(tensors)} tensors have no layer in this base, such as "
            f"{reasons[0][0]}. Was the LoRA made for another base? {rest}"
        )
    else:
        advice = rest
    first = "; ".join(f"{key} {tuple(tensors[key].shape)} {why}" for key, why in reasons[:3])
    return f"{len(reasons)} of {len(tensors)} tensors cannot be read: {first}. {advice}"


def _base_weight(alias: Alias, shape: tuple[int, ...], weight: Weight | None, place: str) -> Tensor:
    """(out, in·kh·kw) of the file's tensor, float32."""
    if weight is None:
        raise LoraFileError(f"{place} is a DoRA, which needs the base model's weights.")
    full = torch.zeros(shape).flatten(1)
    for piece in alias:
        piece.place(weight(piece.site).detach().to("cpu", torch.float32).flatten(1), full)
    return full
