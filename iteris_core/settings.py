"""Settings, each declared once.

A setting is a field of a frozen dataclass derived from :class:`Settings`. :func:`setting` declares
its default, limits and help; its type is the field's. Checks, the command line's ``NAME=VALUE``,
the nodes' inputs and the page ``docs/settings.md`` are all derived from this.

Presets are tables of settings by name; single settings override them (``docs/choosing.md``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from .errors import SettingsError, unknown

_KEY = "setting"
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_T = TypeVar("_T")
Budget = int | Literal["free"] | None
"""Bytes beyond the model (``"free"``: what is free; None: no limit)."""
_Kind = TypeVar("_Kind", bound="Settings")


def setting(default: _T, help: str, **limits: Any) -> _T:
    """A field of a settings dataclass; ``limits`` are :class:`Setting`'s."""
    return field(default=default, metadata={_KEY: Setting(help, **limits)})


@dataclass(frozen=True)
class Setting:
    """The declaration of one setting.

    ``none`` explains the value None. Numbers are at least ``low`` or greater than ``above``, at
    most ``high`` or less than ``below``; a form may offer a smaller range, up to ``most`` in steps
    of ``step``. If both whole numbers and fractions are allowed, a whole number is a count and a
    fraction is a share of ``share``. The rest comes from the field.
    """

    help: str
    none: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    most: float | None = None
    step: float | None = None
    share: str = ""
    name: str = ""
    default: Any = None
    types: frozenset[type] = frozenset()
    choices: tuple[str, ...] = ()

    @property
    def optional(self) -> bool:
        return type(None) in self.types

    @property
    def kind(self) -> type:
        """bool, int, float or str (a choice): the type of its form field."""
        return next((kind for kind in (bool, int, float) if kind in self.types), str)

    def check(self, value: Any) -> None:
        """Raise :class:`SettingsError` for a ``value`` of the wrong type or out of range."""
        expected = self._type()
        if value is None or isinstance(value, bool):
            right = type(value) in self.types
        elif isinstance(value, str):
            right = value in self.choices
        elif not isinstance(value, int | float) or self.kind not in (int, float):
            right = False
        elif isinstance(value, float) and int in self.types:
            right = float in self.types and 0 < value < 1
        else:
            right, expected = math.isfinite(value), self._range() or expected
            right &= self.low is None or self.low <= value
            right &= self.above is None or self.above < value
            right &= self.high is None or value <= self.high
            right &= self.below is None or value < self.below
        if not right:
            others = f" (or {', or '.join(self._alternatives())})" if self._alternatives() else ""
            written = repr(value) if isinstance(value, str) else value
            raise SettingsError(f"{self.name} must be {expected}, not {written}{others}.")

    def parse(self, text: str) -> Any:
        """The value that ``text`` represents, or the text itself if it represents none."""
        text = text.strip()
        word = text.lower()
        if word in self.choices:
            return word
        if word in ("none", "null", "") and self.optional:
            return None
        if bool in self.types and word in (*_TRUE, *_FALSE):
            return word in _TRUE
        for kind in (int, float):
            if kind in self.types:
                with suppress(ValueError):
                    return kind(text)
        return text

    def allowed(self) -> str:
        """The allowed values, in a few words."""
        return ", or ".join([self._type(), *self._alternatives()])

    @staticmethod
    def shown(value: Any) -> str:
        """A value as written after ``NAME=``."""
        if value is None or isinstance(value, bool):
            return str(value).lower()
        return f"{value:g}" if isinstance(value, float) else str(value)

    def explained(self) -> str:
        """The help text, with the meaning of None."""
        return f"{self.help} none: {self.none}." if self.none else self.help

    def _type(self) -> str:
        if bool in self.types:
            return "true or false"
        if int in self.types:
            return "a whole number" + (f", {self._range()}" if self._range() else "")
        if float in self.types:
            return self._range() or "a number"
        return f"one of {', '.join(self.choices)}"

    def _range(self) -> str:
        left = self.above if self.low is None else self.low
        right = self.below if self.high is None else self.high
        if left is not None and right is not None:
            ends = "(" if self.low is None else "[", ")" if self.high is None else "]"
            return f"in {ends[0]}{left:g}, {right:g}{ends[1]}"
        if left is not None:
            return f"above {left:g}" if self.low is None else f"at least {left:g}"
        if right is not None:
            return f"below {right:g}" if self.high is None else f"at most {right:g}"
        return ""

    def _alternatives(self) -> list[str]:
        of = f" of {self.share}" if self.share else ""
        share = [f"a share{of} between 0 and 1"] if {int, float} <= self.types else []
        words = self.choices if self.types & {int, float} else ()
        return [*share, *words, *(["none"] if self.optional else [])]


@dataclass(frozen=True)
class Settings:
    """Base of every settings dataclass; checks the fields on construction."""

    def __post_init__(self) -> None:
        """Raise :class:`SettingsError` for the first field that is out of range."""
        for name, declared in declared_settings(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, Real) and not isinstance(value, int | float):  # such as numpy's
                value = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, name, value)
            declared.check(value)

    @classmethod
    def from_mapping(cls: type[_Kind], values: Mapping[str, Any]) -> _Kind:
        """Build from names and values; raises :class:`SettingsError` for an unknown name or a value
        out of range."""
        for name in values:
            if name not in cls.__dataclass_fields__:
                raise SettingsError(f"{cls.__name__}: {unknown_setting(name, cls)}")
        return cls(**values)


def unknown_setting(name: Any, *owners: type[Settings]) -> str:
    """The end of a message about a name that no setting of ``owners`` has."""
    return unknown("setting", name, [f.name for owner in owners for f in fields(owner)])


def budget_of(memory: Any) -> Budget:
    """A ``memory_budget`` given as any real number of bytes. Raises :class:`SettingsError` for
    anything else."""
    if memory is None or (isinstance(memory, str) and memory == "free"):
        return memory
    number = math.nan
    if not isinstance(memory, bool) and isinstance(memory, Real):
        number = float(memory)
    if not 0 <= number < math.inf:
        raise SettingsError(f'memory_budget must be bytes, "free" or None, not {memory!r}.')
    return int(number)


@cache
def declared_settings(owner: type) -> Mapping[str, Setting]:
    """The settings of a dataclass by name, in order."""
    hints = get_type_hints(owner)
    return {
        f.name: replace(
            f.metadata[_KEY],
            name=f.name,
            default=f.default,
            types=frozenset(part for part in _parts(hints[f.name]) if isinstance(part, type)),
            choices=tuple(part for part in _parts(hints[f.name]) if isinstance(part, str)),
        )
        for f in fields(owner)
        if _KEY in f.metadata
    }


def _parts(hint: Any) -> list[Any]:
    """The types of a union and the values of a Literal."""
    inner = get_args(hint)
    return [part for kind in inner for part in _parts(kind)] if inner else [hint]


PresetName = Literal["default", "fast", "best", "tidy", "paper"]


@dataclass(frozen=True)
class Preset:
    """``settings`` apply to ``iteris``; other methods use only the ``calibration``."""

    help: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])


PRESETS: Mapping[PresetName, Preset] = {
    "default": Preset("Every setting at its own default."),
    "fast": Preset(
        "A quarter of the prompts, and no steps through the denoiser: a closed form alone.",
        settings={"steps": 0},
        calibration={"samples": 32, "total_samples": 128, "timesteps": 2, "denoising_steps": 4},
    ),
    "best": Preset(
        "More prompts, and 200 steps through the denoiser, which keep more of each LoRA, at every "
        "strength.",
        settings={"steps": 200},
        calibration={"samples": 100, "total_samples": 500},
    ),
    "tidy": Preset(
        "For one LoRA or several: each acts on its trigger only. Its class word alone, and all "
        "other prompts, get the base.",
        settings={"rank": 32, "steps": 100},
        calibration={"class_words": 0.5, "generic": 0.5},
    ),
    # Algorithm 1 with eqs. 5, 7 and 8. Section 3.2: "we typically set α to 1e-4 or lower", and
    # "we cap the iterations at 20 in our experiments"; 4.1: "50 input samples". 4.1 names no α.
    "paper": Preset(
        "The paper's Algorithm 1 to the letter, 20 iterations over all layers. Far slower, and "
        "behind the default with many concepts.",
        settings={
            "schedule": "jacobi",
            "iterations": 20,
            "objective": "adapter",
            "weighting": "adapter",
            "ridge": 1e-4,
            "bound": 0.0,
            "shrink": 1.0,
            "rank": None,
            "row_tokens": "all",
            "saliency": 0.0,
            "repair": False,
            "steps": 0,
        },
        calibration={
            "samples": 50,
            "total_samples": None,
            "timesteps": 4,
            "denoising_steps": 10,
            "empty_share": 0.0,
            "contexts": 0.0,
            "generic": 0.0,
            "conditions": 0.0,
            "composites": 0.0,
        },
    ),
}
