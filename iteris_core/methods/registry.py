"""The register of merge methods, and what a method gets and gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SettingsError
from ..lora import LowRank
from ..passes.job import Job
from ..report.report import SiteReport
from ..settings import Settings

SUM_OF_RANKS = "the sum of the LoRAs' ranks"
ROWS_PER_FORWARD = "Rows per forward; the result is the same for any number."

Merged = Mapping[str, tuple[LowRank, SiteReport]]


@dataclass(frozen=True)
class Method:
    name: str
    merge: Callable[[Job, Any], Merged]
    settings: type[Settings]
    needs_host: bool
    summary: str


_METHODS: dict[str, Method] = {}


def method(
    name: str, settings: type[Settings], *, needs_host: bool
) -> Callable[[Callable[[Job, Any], Merged]], Callable[[Job, Any], Merged]]:
    """Register a merge method; the first line of its docstring is its summary."""

    def register(function: Callable[[Job, Any], Merged]) -> Callable[[Job, Any], Merged]:
        if name in _METHODS:
            raise ValueError(f"There is a method {name!r} already.")
        summary = (function.__doc__ or "").strip().splitlines()[0]
        _METHODS[name] = Method(name, function, settings, needs_host, summary)
        return function

    return register


def find_method(name: str) -> Method:
    found = _METHODS.get(name)
    if found is None:
        raise SettingsError(f"There is no method {name!r}; there are: {', '.join(_METHODS)}.")
    return found


def all_methods() -> list[Method]:
    return list(_METHODS.values())
