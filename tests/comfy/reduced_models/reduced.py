"""What a reduced model is, as the tests take it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Reduced:
    """``side`` is that of its latents, or the length of a sound's, whose ``shape`` is given;
    ``entries`` are what it is given beside a text, ``settings``
    those of its merges. One with ``experts`` is a pair of models, for high and for low noise.
    ``apart`` are parts of the names of layers that cannot be merged, and ``left_out`` says why.
    Those that ``slow`` marks have a near relative that is not."""

    make: Callable[[], tuple[Any, Any]]
    side: int = 8
    shape: tuple[int, ...] = ()
    video: bool = False
    experts: bool = False
    entries: Mapping[str, Any] = field(default_factory=dict[str, Any])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    apart: tuple[str, ...] = ()
    left_out: str = ""
    slow: bool = False
