"""Retries with less memory when memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from ..errors import OutOfMemory, brief
from .meter import is_out_of_memory

_Way = TypeVar("_Way")
_Made = TypeVar("_Made")


def with_less(
    ways: Iterable[_Way],
    run: Callable[[_Way], _Made],
    complaint: Callable[[str, Sequence[_Way]], str],
    *,
    release: Callable[[], None] | None = None,
    ran_out: Callable[[Exception], bool] = is_out_of_memory,
) -> tuple[_Made, _Way]:
    """The result of ``run`` for the first of ``ways`` for which memory suffices, and that way.

    ``release`` frees caches of allocators other than CUDA's; ``ran_out`` recognises the errors.
    Raises :class:`OutOfMemory` with ``complaint`` applied to the last error's text and the ways
    tried.
    """
    tried: list[_Way] = []
    said = ""  # not the error itself, whose frames keep tensors alive
    for way in ways:
        try:
            return run(way), way
        except Exception as error:
            if not ran_out(error):
                raise
            tried.append(way)
            said = brief(error)
        gc.collect()  # frames that the error left behind
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if release is not None:
            release()
    raise OutOfMemory(complaint(said, tried))


def halved(rows: int) -> Iterator[int]:
    """``rows``, then half as many, and so on down to one."""
    while rows > 1:
        yield rows
        rows //= 2
    yield 1
