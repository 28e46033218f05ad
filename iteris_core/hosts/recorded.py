"""Denoiser calls, recorded while an application's own loop makes them, as rows to run again.

The meaning of the arguments is unknown. Some, tensors or lists, have an entry for every row of the
batch; the others are shared. A row consists of its entries and the shared arguments. Rows with
entries of equal shapes and the same shared arguments can be joined into one call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Axes = Mapping[str, int]
"""Argument with an entry per row → its batch dimension."""

Call = dict[str, Any]
"""Argument → value; a dictionary argument is flattened to ``argument.key`` → value."""


@contextmanager
def replaced_forward(
    module: nn.Module, replace: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Generator[None]:
    """Context in which ``module`` runs ``replace(forward)`` instead of its forward."""
    # An instance forward exists if something else (offloading) set one.
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = replace(module.forward)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def batched_in(single: Call, double: Call) -> dict[str, int]:
    """The arguments with an entry per row, and their batch dimension, from a call with one row and
    one with two."""
    axes: dict[str, int] = {}
    for path, a in single.items():
        b = double.get(path)
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.ndim == b.ndim:
            pairs = zip(a.shape, b.shape, strict=True)
            other = [(axis, n, m) for axis, (n, m) in enumerate(pairs) if n != m]
            if len(other) == 1 and other[0][2] == 2 * other[0][1]:
                axes[path] = other[0][0]
        lists = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple))
        if lists and len(b) == 2 * len(a) > 0:  # pyright: ignore
            axes[path] = 0
    return axes


def entries(call: Call, batched: Axes, row: int) -> Call:
    """One row of ``call``, without batch dimensions; a single number applies to every row."""
    of_row = dict(call)
    for path in batched.keys() & call.keys():
        value = call[path]
        if not isinstance(value, Tensor):
            of_row[path] = value[row]
        elif value.ndim:
            of_row[path] = value.select(batched[path], row)
    return of_row


def joined(rows: Sequence[Call], batched: Axes, lists: Set[str], device: Any) -> Call:
    """One call of ``rows`` of one :func:`kind`; ``lists`` are those ``batched`` but not tensors."""
    call: Call = {}
    for path in rows[0]:
        values = [row[path] for row in (rows if path in batched else rows[:1])]
        # CUDA takes memory that is not pinned before it goes on.
        to_card = torch.device(device).type == "cuda"
        values = [
            v.to(device, non_blocking=to_card) if isinstance(v, Tensor) else v for v in values
        ]
        if path not in batched:
            call[path] = values[0]
        else:
            call[path] = values if path in lists else torch.stack(values, dim=batched[path])
    return call


def kind(row: Call, batched: Axes, *, masks: bool = True) -> Hashable:
    """A key that is equal for rows that may share a call. With ``masks``, their masks must also
    pass the same number of entries: some models pack the unmasked entries, and a shorter row would
    get padding."""
    return tuple(
        (path, _key(value, path in batched), masks and path in batched and passed(value))
        for path, value in sorted(row.items())
    )


def passed(value: Any) -> int | None:
    """The number of entries in a row that a mask passes; None if it is not a mask."""
    if not isinstance(value, Tensor) or not value.ndim or value.is_floating_point():
        return None
    return int(value.sum()) if bool(((value == 0) | (value == 1)).all()) else None


def size(row: Call) -> int:
    """The number of elements in a row's entries."""
    return sum(value.numel() for value in row.values() if isinstance(value, Tensor))


def differ(value: Any, other: Any, share: float = 0.0) -> bool:
    """True if two values of an argument differ, tensors by more than ``share`` of their norm."""
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        if value.shape != other.shape:
            return True
        value, other = value.double(), other.double()
        return bool((value - other).norm() > share * value.norm())
    if isinstance(value, (list, tuple)) and isinstance(other, (list, tuple)):
        pairs = zip(value, other, strict=False)  # pyright: ignore
        return len(value) != len(other) or any(differ(a, b, share) for a, b in pairs)  # pyright: ignore
    return type(value) is not type(other) or bool(value != other)


def _key(value: Any, shape_only: bool) -> Hashable:
    """The shapes and types in an argument, unless ``shape_only`` also the numbers in tensors."""
    if isinstance(value, Tensor):
        numbers = [] if shape_only else value.detach().to("cpu", torch.float64).flatten().tolist()
        return tuple(value.shape), value.dtype, hash(tuple(numbers))
    if isinstance(value, (list, tuple)):
        return tuple(_key(part, shape_only) for part in value)  # pyright: ignore
    if isinstance(value, dict):
        return tuple((key, _key(part, shape_only)) for key, part in value.items())  # pyright: ignore
    return type(value), value if isinstance(value, Hashable) else id(value)
