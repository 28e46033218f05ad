"""A merge as one value: what is merged, by which method and settings, and what becomes of it.

The command line, a merge file, the recipe in a merged file and the nodes are ways to write one.
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
"""Keys that are no option of ``iteris merge``."""


@dataclass(frozen=True)
class MergeConfig:
    """``settings`` are of the ``method``, ``calibration`` says how features are collected; both go
    over what the ``preset`` says.

    ``base`` is the model's folder, file or name on the hub. ``unmergeable`` is as in
    :func:`.merge.merge_loras`. ``cut`` is what was done to the merged LoRA afterwards: the ``rank``
    with ``ordered`` of :func:`.report.provenance.cut_lora`, and the ``strength`` of
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
        """The inverse of :meth:`to_dict`. ``where`` is what an error says of ``data``; ``concept``
        makes one from an entry of its concepts and from what an error says of that.

        Raises :class:`MergeFileError` for a value of another kind.
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
        names = ("method", "preset", "settings", "calibration")
        return {name: getattr(self, name) for name in names}

    def to_dict(self, name: Callable[[Path], str] = str, *, usual: bool = True) -> dict[str, Any]:
        """The configuration in built-in types alone; ``name`` and ``usual`` are as in
        :meth:`.concept_config.ConceptConfig.to_dict`."""
        data = {
            **{key: getattr(self, key) for key in _TEXTS},
            **self.outputs,
            "concepts": [concept.to_dict(name, usual=usual) for concept in self.concepts],
            **{key: dict(getattr(self, key)) for key in _MAPPINGS},
        }
        default = {"base": "", "preset": "default", "cut": {}}
        return {key: v for key, v in data.items() if usual or v != default.get(key)}
