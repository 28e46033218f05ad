"""Presets: tables of settings by name; single settings override them (``docs/choosing.md``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

PresetName = Literal["default", "fast", "best", "tidy", "paper"]


@dataclass(frozen=True)
class Preset:
    """``settings`` apply to ``iteris``; other methods use only the ``calibration``."""

    help: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])


PRESETS: Mapping[PresetName, Preset] = {
    "default": Preset("Every setting at its own default."),
    "fast": Preset("A quarter of the prompts.", calibration={"samples": 12}),
    "best": Preset(
        "Twice the prompts, and 120 polish steps per block (proportionally more with more than "
        "two LoRAs). For several concepts in one image, many concepts or a low rank. Takes six to "
        "seven times as long.",
        settings={"block_steps": 120},
        calibration={"samples": 100},
    ),
    "tidy": Preset(
        "For one LoRA or several: each acts on its trigger only. Its class word alone, and all "
        "other prompts, get the base.",
        settings={"rank": 32, "block_steps": 120},
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
            "tolerance": None,
            "objective": "adapter",
            "weighting": "adapter",
            "ridge": 1e-4,
            "bound": 0.0,
            "shrink": 1.0,
            "rank": None,
            "row_tokens": "all",
            "saliency": 0.0,
            "repair": False,
            "block_steps": 0,
        },
        calibration={
            "samples": 50,
            "empty_share": 0.0,
            "contexts": 0.0,
            "generic": 0.0,
            "conditions": 0.0,
            "composites": 0.0,
        },
    ),
}
