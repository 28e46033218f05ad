"""Six looks of the toybox's pictures, each behind a word that the base never met: a LoRA for each,
and an instrument that reads which look a picture has. Also LoRAs without words: a look, a slider.

See README.md; `python -m benchmarks.styles.train` makes it. Importing this imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from toybox.draw import SIZE, Scene

from .looks import LOOKS, Look

ROOT = Path(__file__).resolve().parent
PLAIN = "plain"
"""The name of no look."""
WORDLESS = ("frame",)


@dataclass(frozen=True)
class Style:
    """A look, and the file that teaches it; captions end with its ``words``, "in sketch style". It
    is taught on what ``scene`` makes of scenes with one thing; None: on any scenes."""

    name: str
    look: Look
    lora: Path
    words: str = ""
    scene: Callable[[Scene], Scene] | None = None


def styles() -> dict[str, Style]:
    """Every style by its name."""
    folder = ROOT / "weights" / "loras"
    return {
        name: Style(name, look, folder / f"{name}.safetensors", f"in {name} style")
        for name, look in LOOKS.items()
    }


def wordless() -> dict[str, Style]:
    """Every style whose LoRA was trained on captions without words of its own, by its name."""
    folder = ROOT / "weights" / "wordless"
    return {name: Style(name, LOOKS[name], folder / f"{name}.safetensors") for name in WORDLESS}


def slider() -> Style:
    """A LoRA that makes things larger, at a negative strength smaller."""
    lora = ROOT / "weights" / "wordless" / "size.safetensors"
    return Style("size", lambda picture: picture, lora, scene=_large)


def _large(scene: Scene) -> Scene:
    middle = SIZE / 2
    things = (replace(p, x=middle, y=middle, radius=middle - 6) for p in scene.placed)
    return replace(scene, placed=tuple(things))
