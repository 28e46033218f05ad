"""Changes of biases and normalisations, which a file stores in full: ``….diff`` for a
one-dimensional weight, ``….diff_b`` for the bias of any module.

ComfyUI's stock loader reads them under kohya's names, or under its own names for modules that
sd-scripts never trains. peft's layout has no place for them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..architectures.row_mapping import Alias, Shapes, file_rows, whole
from ..errors import LoraFileError, OutputError

_LEAVES = {"weight": ".diff", "bias": ".diff_b"}


def vector_names(
    names: Mapping[str, str], written: Mapping[str, Alias], shapes: Shapes
) -> dict[str, Alias]:
    """Key in a file → the parameters among ``shapes`` that it changes. ``names`` are the file's
    names by module, or by parameter if it is neither weight nor bias; ``written`` are the sites'
    names, whose biases are fused in the same way."""
    found: dict[str, Alias] = {}
    for name, alias in written.items():
        biases = tuple(replace(piece, site=f"{piece.site}.bias") for piece in alias)
        if all(piece.site in shapes for piece in biases):
            found[f"{name}.diff_b"] = biases
    placed = {piece.site for alias in found.values() for piece in alias}
    for parameter, shape in shapes.items():
        module, _, leaf = parameter.rpartition(".")
        name, end = names.get(parameter), ".diff"
        if leaf in _LEAVES:
            name, end = names.get(module), _LEAVES[leaf]
        if len(shape) == 1 and name is not None and parameter not in placed:
            found[name + end] = whole(parameter, shapes)
    return found


def placed(vectors: Container[str], keys: Mapping[str, Alias]) -> set[str]:
    """The ``vectors`` for which ``keys`` have a place."""
    return {piece.site for alias in keys.values() for piece in alias if piece.site in vectors}


def vectors_to_file(
    vectors: Mapping[str, Tensor], keys: Mapping[str, Alias], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a file under ``keys``. Raises :class:`OutputError` for a vector without a
    place, and for values that do not fit in ``dtype``."""
    missing = sorted(vectors.keys() - placed(vectors, keys))
    if missing:
        raise OutputError(
            f"{len(missing)} changes of biases and normalisations have no place in this layout, "
            f"such as {missing[0]}; use kohya, which holds all that a file can hold."
        )
    tensors: dict[str, Tensor] = {}
    for key, alias in keys.items():
        own = [piece for piece in alias if piece.site in vectors]
        if own:
            tensor = torch.zeros(file_rows(alias))
            for piece in own:
                piece.place(vectors[piece.site].float().cpu(), tensor)
            tensors[key] = tensor.to(dtype)
            if not bool(torch.isfinite(tensors[key]).all()):
                raise OutputError(f"{key}: values are too large for {dtype}; write float32.")
    return tensors


def vectors_of_file(place: str, tensor: Tensor, alias: Alias) -> dict[str, Tensor]:
    """Parameter → its change, (n,), float32, from one tensor of a file. Raises
    :class:`LoraFileError`, starting with ``place``, for another shape."""
    if tensor.shape != (file_rows(alias),) or not tensor.is_floating_point():
        raise LoraFileError(
            f"{place} is {tuple(tensor.shape)} {tensor.dtype}, where the base model has "
            f"{file_rows(alias)} numbers; this LoRA was made for another base model."
        )
    return {piece.site: piece.of_file(tensor.float()) for piece in alias}
