"""The node with a merge's advanced options, and the inputs of a merging node as a request to the
library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from comfy_api.latest import io

from ..iteris_core.calibration import Calibration
from ..iteris_core.concepts import Concept
from ..iteris_core.config import MergeConfig, Unmergeable
from ..iteris_core.methods import find_method
from ..iteris_core.methods.fitting import IterisSettings
from ..iteris_core.settings import PresetName, Settings, declared_settings
from .comfy_conds import References
from .comfy_sizes import scale
from .schema import METHOD, advanced, changed, schema, setting_input

CALIBRATION = (
    "timesteps", "latents", "frames", "denoising_steps", "guidance", "empty_share", "contexts",
    "generic", "composites",
)  # fmt: skip
ITERIS = (
    "rank", "share_ranks", "repair", "steps", "schedule", "iterations", "objective",
    "weighting", "ridge", "shrink", "saliency", "row_tokens", "precision",
)  # fmt: skip
"""Excludes the number of rows per forward, which memory decides, and the bound."""
PLAIN = ("timesteps", "latents", "frames", "denoising_steps", "guidance", "rank", "repair")
"""Of these settings, those that the front end does not fold away."""
_DIRECT = ("preset", "samples", "seed", "minutes")
_KEPT = ("use", "make again")


@dataclass(frozen=True)
class Request:
    """``values`` are those of IterIS Settings, by name. ``samples`` 0 means the preset's number,
    ``minutes`` 0 no limit. ``pixels`` is pixels per latent side."""

    preset: PresetName = "default"
    samples: int = 0
    seed: int = 0
    minutes: float = 0.0
    values: Mapping[str, Any] = field(default_factory=dict)
    references: References = field(default_factory=References)
    pixels: int = 8

    @classmethod
    def of(cls, values: Mapping[str, Any], model: Any) -> Request:
        """The request from a node's inputs by name; missing ones have their defaults."""
        direct = {name: values[name] for name in _DIRECT if name in values}
        references = References.of(values.get("conditioning"), values.get("latent"))
        given = values.get("settings") or {}
        pixels = 8 if model is None else scale(model)
        return cls(**direct, values=given, references=references, pixels=pixels)

    def config(self, concepts: Sequence[Concept], method: str) -> MergeConfig:
        """The inputs over the preset."""
        values = {name: self.values[name] for name in CALIBRATION if name in self.values}
        calibration = changed(Calibration, {"seed": self.seed, "minutes": self.minutes, **values})
        calibration |= {"samples": self.samples} if self.samples else {}
        if size := self.values.get("image_size", 0):
            calibration["latent_size"] = max(1, round(size / self.pixels))
        return MergeConfig(
            concepts=tuple(concepts),
            method=method,
            preset=self.preset,
            settings=self._settings(method),
            calibration=calibration,
            unmergeable=self.values.get("cannot_merge", "refuse"),
        )

    def _settings(self, method: str) -> dict[str, Any]:
        """The method's settings; of methods other than iteris, the rank."""
        if method != METHOD:
            rank = self.values.get("rank", 0)
            known = declared_settings(find_method(method).settings)
            return {"rank": rank} if rank > 0 and "rank" in known else {}
        values = {name: self.values[name] for name in ITERIS if name in self.values}
        return changed(IterisSettings, values, self.preset)

    @property
    def memory_budget(self) -> int | Literal["free"]:
        memory: float = self.values.get("memory", 0.0)
        return round(memory * 2**30) if memory else "free"

    @property
    def again(self) -> bool:
        """True if a merge that is kept is to be made again; "clear" is older graphs' word."""
        return self.values.get("kept", _KEPT[0]) != _KEPT[0]

    @property
    def distilled(self) -> bool | None:
        """True if the base runs without guidance; None: detect it."""
        return {"yes": False, "no": True}.get(self.values.get("empty_prompts", "auto"))

    @property
    def base(self) -> dict[str, Any]:
        """Arguments of :class:`.comfy_host.ComfyHost`."""
        return {"references": self.references, "distilled": self.distilled}


def _settings(owner: type[Settings], names: Sequence[str]) -> list[Any]:
    inputs = {name: setting_input(owner, name) for name in names}
    return [one if name in PLAIN else advanced(one) for name, one in inputs.items()]


class IterisMergeSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = list(get_args(Unmergeable))
        return schema(
            "IterisSettings",
            ["merge settings", "ridge", "image size", "rank"],
            inputs=[
                io.Int.Input("image_size", default=0, min=0, max=4096, step=64, optional=True),
                *_settings(Calibration, CALIBRATION),
                io.Combo.Input(
                    "empty_prompts", options=["auto", "yes", "no"], default="auto", optional=True
                ),
                io.Combo.Input("cannot_merge", options=choices, default="refuse", optional=True),
                io.Float.Input("memory", default=0.0, max=1024.0, min=0.0, step=0.1, optional=True),
                *_settings(IterisSettings, ITERIS),
                io.Combo.Input("kept", options=list(_KEPT), default=_KEPT[0], optional=True),
            ],
            outputs=("settings",),
        )

    @classmethod
    def validate_inputs(cls, kept: Any = None) -> bool | str:
        known = kept in (None, *_KEPT, "clear")
        return known or f"kept is {kept!r}, but can be {' or '.join(_KEPT)}."

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(dict(values))
