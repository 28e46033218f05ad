"""The node with the advanced options of a merge."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from comfy_api.latest import io

from ..iteris_core.concepts import Calibration
from ..iteris_core.config import Unmergeable
from ..iteris_core.methods import all_methods
from ..iteris_core.methods.iteris_settings import IterisSettings
from ..iteris_core.settings import declared_settings
from .merge_inputs import setting_input
from .merge_settings import CALIBRATION, ITERIS, RIVALS
from .schema import MergeSettings, schema


def rival_input(name: str) -> Any:
    """A setting that some of the other methods have, each with a default of its own."""
    declared = {
        method.name: known[name]
        for method in all_methods()
        if name in (known := declared_settings(method.settings))
    }
    defaults = ", ".join(f"{method} {one.shown(one.default)}" for method, one in declared.items())
    return io.Float.Input(
        name,
        default=0.0,
        min=0.0,
        max=1.0 if all(one.high == 1 for one in declared.values()) else 10.0,
        step=0.05,
        optional=True,
        tooltip=f"{RIVALS[name]} 0: the method's own ({defaults}).",
    )


def _all_inputs() -> Iterable[Any]:
    yield io.Int.Input("image_size", default=0, min=0, max=4096, step=64, optional=True)
    yield from (setting_input(Calibration, name) for name in CALIBRATION)
    yield io.Combo.Input(
        "empty_prompts", options=["auto", "yes", "no"], default="auto", optional=True
    )
    yield io.Combo.Input(
        "cannot_merge", options=list(get_args(Unmergeable)), default="refuse", optional=True
    )
    yield io.Float.Input("memory", default=0.0, min=0.0, max=1024.0, step=0.1, optional=True)
    yield from (setting_input(IterisSettings, name) for name in ITERIS)
    yield from map(rival_input, RIVALS)


class IterisMergeSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisSettings",
            "IterIS Settings",
            ["merge settings", "density", "ridge", "image size", "rank"],
            inputs=list(_all_inputs()),
            outputs=[MergeSettings.Output(display_name="settings")],
        )

    @classmethod
    def execute(cls, **values: Any) -> io.NodeOutput:
        return io.NodeOutput(dict(values))
