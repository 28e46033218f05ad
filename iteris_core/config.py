"""A merge as one value: its concepts, method, settings and outputs.

The command line, a merge file, the recipe in a merged file and the nodes all build one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from .concept_config import ConceptConfig
from .errors import MergeFileError
from .presets import PresetName

Unmergeable = Literal["refuse", "skip", "mean"]

_MAPPINGS = ("settings", "calibration", "cut")
_WORDS = {"preset": get_args(PresetName), "unmergeable": get_args(Unmergeable)}
_TEXTS = ("base", "method", *_WORDS)
_KINDS = {**dict.fromkeys(_MAPPINGS, dict), **dict.fromkeys(_TEXTS, str), "concepts": list}
_CALLED = {dict: "a mapping of names to values", str: "text", list: "a list"}
KEYS = ("base", "concepts", *_MAPPINGS)
"""Keys that are not options of ``iteris merge``."""


@dataclass(frozen=True)
class MergeConfig:
    """A complete merge request. ``settings`` belong to the ``method``, ``calibration`` controls how
    features are collected; both override the ``preset``.

    ``base`` is the model's folder, file or hub name. ``unmergeable`` is as in
    :func:`.merge.merge_loras`. ``cut`` records later changes to the merged LoRA: ``rank`` and
    ``ordered`` of :func:`.report.provenance.cut_lora`, and ``strength`` of
    :func:`.report.provenance.scaled_lora`. ``outputs`` are the other options of ``iteris merge`` by
    name: how the base is loaded, and how the result is written.
    """

    concepts: Sequence[ConceptConfig] = ()
    method: str = "iteris"
    preset: PresetName = "default"
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    unmergeable: Unmergeable = "refuse"
    base: str = ""
    cut: Mapping[str, Any] = field(default_factory=dict[str, Any])
    outputs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        where: str,
        concept: Callable[[Any, str], ConceptConfig] = ConceptConfig.from_dict,
    ) -> MergeConfig:
        """The inverse of :meth:`to_dict`. Error messages use ``where`` to name ``data``;
        ``concept`` builds a concept from an entry and from the entry's name in messages.

        Raises :class:`MergeFileError` for a value of the wrong type.
        """
        given = {key: value for key, value in data.items() if value is not None}
        for name in _KINDS.keys() & given.keys():
            kind, value, words = _KINDS[name], given[name], _WORDS.get(name, ())
            if not isinstance(value, kind) or (words and value not in words):
                what = f"one of {', '.join(words)}" if words else _CALLED[kind]
                raise MergeFileError(f"{where}: {name} must be {what}, not {value!r}.")
        entries: list[Any] = given.pop("concepts", [])
        if "strength" in given:
            given["cut"] = {**given.get("cut", {}), "strength": given.pop("strength")}
        fields = {key: given.pop(key) for key in (*_MAPPINGS, *_TEXTS) if key in given}
        concepts = tuple(
            concept(entry, f"{where}: concept {number}") for number, entry in enumerate(entries, 1)
        )
        return cls(concepts, **fields, outputs=given)

    @property
    def choices(self) -> dict[str, Any]:
        """Arguments of :func:`.merge.merge_loras` and :func:`.preview.preview_merge` by name."""
        names = ("method", "preset", "settings", "calibration", "unmergeable")
        return {name: getattr(self, name) for name in names}

    def to_dict(self, name: Callable[[Path], str] = str, *, usual: bool = True) -> dict[str, Any]:
        """The configuration in built-in types only; ``name`` and ``usual`` are as in
        :meth:`.concept_config.ConceptConfig.to_dict`."""
        data = {
            **{key: getattr(self, key) for key in _TEXTS},
            **self.outputs,
            "concepts": [concept.to_dict(name, usual=usual) for concept in self.concepts],
            **{key: dict(getattr(self, key)) for key in _MAPPINGS},
        }
        default = {"base": "", "preset": "default", "cut": {}}
        return {key: v for key, v in data.items() if usual or v != default.get(key)}
