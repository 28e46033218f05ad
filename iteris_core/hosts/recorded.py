"""Calls of a denoiser, kept while an application's own loop makes them, as rows to be run again.

Nothing is known of what the arguments mean. Some have an entry for every row of the batch, a tensor
or a list; the others are shared. A row is its entries and what is shared; rows whose entries have
equal shapes, and that share the same, can be joined to one call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn

Axes = Mapping[str, int]
"""Argument with an entry a row → the dimension in which it has them."""

Call = dict[str, Any]
"""Argument → value; of one that is a dictionary, ``argument.key`` → value."""

See = Callable[[str, Call, Callable[[], Any]], Any]
"""``see(denoiser, call, run)`` gives what the denoiser is to give; ``run()`` runs it."""

_see: ContextVar[See | None] = ContextVar("see", default=None)
# Every greenlet has a context of its own: forwards that wait for each other do not mix.


@contextmanager
def replaced_forward(
    module: nn.Module, replace: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Generator[None]:
    """While it is entered, ``module`` runs what ``replace`` makes of its forward."""
    # An own forward is there where something else has put it (offloading).
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = replace(module.forward)
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


class Recorders:
    """On the ``forward`` of denoisers, by name; taken off when the last who opened them is done."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._on = ExitStack()
        self._open = 0

    @contextmanager
    def open(self, see: See) -> Generator[None]:
        """Forwards that are called in here, in this context, go through ``see``."""
        if not self._open:
            for name, module in self._modules.items():
                self._on.enter_context(replaced_forward(module, partial(_through, name, module)))
        self._open += 1
        token = _see.set(see)
        try:
            yield
        finally:
            _see.reset(token)
            self._open -= 1
            if not self._open:
                self._on.close()


def _through(name: str, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(type(module).forward)

    @wraps(forward)  # pipelines ask for its arguments
    def through(*args: Any, **kwargs: Any) -> Any:
        see = _see.get()
        if see is None:
            return forward(*args, **kwargs)
        call = _flat(signature.bind(module, *args, **kwargs).arguments)
        return see(name, call, lambda: forward(*args, **kwargs))

    return through


def _flat(arguments: Mapping[str, Any]) -> Call:
    """``self`` left out; what ``**kwargs`` took stands beside the others."""
    call: Call = {}
    for name, value in list(arguments.items())[1:]:
        if name == "kwargs":
            call |= value
        elif isinstance(value, dict) and value:
            call |= {f"{name}.{key}": some for key, some in value.items()}  # pyright: ignore
        else:
            call[name] = value
    return call


def arguments_of(call: Call) -> dict[str, Any]:
    """The keyword arguments that ``call`` was made from."""
    arguments: dict[str, Any] = {}
    for path, value in call.items():
        name, dot, key = path.partition(".")
        if dot:
            arguments.setdefault(name, {})[key] = value
        else:
            arguments[name] = value
    return arguments


def batched_in(one: Call, two: Call) -> dict[str, int]:
    """The arguments with an entry a row, and the dimension in which they have it, from a call of
    one row and one of two."""
    axes = {path: _doubled(value, two.get(path)) for path, value in one.items()}
    return {path: axis for path, axis in axes.items() if axis is not None}


def _doubled(one: Any, two: Any) -> int | None:
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim:
        pairs = zip(one.shape, two.shape, strict=True)
        other = [(axis, n, m) for axis, (n, m) in enumerate(pairs) if n != m]
        return other[0][0] if len(other) == 1 and other[0][2] == 2 * other[0][1] else None
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return 0 if len(two) == 2 * len(one) > 0 else None  # pyright: ignore
    return None


def rows_in(call: Call, batched: Axes) -> int:
    """The number of rows of ``call``."""
    counts = [_count(call[path], axis) for path, axis in batched.items() if path in call]
    return max(counts, default=1)


def _count(value: Any, axis: int) -> int:
    return value.shape[axis] if isinstance(value, Tensor) else len(value)


def entries(call: Call, batched: Axes, row: int) -> Call:
    """One row of ``call``: of what is ``batched`` its entry, without the dimension of the batch. A
    number for all rows is that of each."""
    return {
        path: _entry(value, batched[path], row) if path in batched else value
        for path, value in call.items()
    }


def _entry(value: Any, axis: int, row: int) -> Any:
    if isinstance(value, Tensor):
        return value.select(axis, row) if value.ndim else value
    return value[row]


def joined(rows: Sequence[Call], batched: Axes, lists: Set[str], device: Any) -> Call:
    """One call of ``rows``, which must be of one :func:`kind`; ``lists`` are those of ``batched``
    that are no tensors."""
    call: Call = {}
    for path, first in rows[0].items():
        if path not in batched:
            call[path] = first.to(device) if isinstance(first, Tensor) else first
        elif path in lists:
            some = [row[path] for row in rows]
            call[path] = [s.to(device) if isinstance(s, Tensor) else s for s in some]
        else:
            some = [row[path].to(device) for row in rows]
            call[path] = torch.stack(some, dim=batched[path])
    return call


def kind(row: Call, batched: Axes, *, masks: bool = True) -> Hashable:
    """Equal for rows that may share a call. With ``masks`` they also let as many entries pass:
    some models pack what their rows' masks leave, and the shorter row would get padding."""
    return tuple(
        (path, _shape(value), masks and passed(value)) if path in batched else (path, _value(value))
        for path, value in sorted(row.items())
    )


def passed(value: Any) -> int | None:
    """The number of entries of a row that a mask lets pass; None for what is no mask."""
    if not isinstance(value, Tensor) or not value.ndim or value.is_floating_point():
        return None
    return int(value.sum()) if bool(((value == 0) | (value == 1)).all()) else None


def size(row: Call) -> int:
    """The number of elements in the entries of a row."""
    return sum(value.numel() for value in row.values() if isinstance(value, Tensor))


def differ(one: Any, other: Any, share: float = 0.0) -> bool:
    """True if two values of an argument differ, tensors by more than ``share`` of their norm."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape:
            return True
        one, other = one.double(), other.double()
        return bool((one - other).norm() > share * one.norm())
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        pairs = zip(one, other, strict=False)  # pyright: ignore
        return len(one) != len(other) or any(differ(a, b, share) for a, b in pairs)  # pyright: ignore
    return type(one) is not type(other) or bool(one != other)


def _shape(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(_shape(part) for part in value)  # pyright: ignore
    return type(value), value if isinstance(value, (bool, int, float, str)) else None


def _value(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        numbers = value.detach().to("cpu", torch.float64).flatten().tolist()
        return tuple(value.shape), hash(tuple(numbers))
    if isinstance(value, (list, tuple)):
        return tuple(_value(part) for part in value)  # pyright: ignore
    if isinstance(value, dict):
        return tuple((key, _value(part)) for key, part in value.items())  # pyright: ignore
    return value if isinstance(value, Hashable) else id(value)
