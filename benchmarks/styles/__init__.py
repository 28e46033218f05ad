"""Six looks of the toybox's pictures, each behind a word that the base never met: a LoRA for each,
and an instrument that reads which look a picture has. Also a LoRA of ``frame`` without words.

See README.md; the program that made them is at commit 2d391296. Importing this imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
LOOKS = ("sketch", "negative", "pixel", "palette", "frame", "porthole")
PLAIN = "plain"
"""The name of no look."""


@dataclass(frozen=True)
class Style:
    """A look, and the file that teaches it; captions end with its ``words``, "in sketch style"."""

    name: str
    lora: Path
    words: str


def styles() -> dict[str, Style]:
    """Every style by its name."""
    folder = ROOT / "weights" / "loras"
    return {name: Style(name, folder / f"{name}.safetensors", f"in {name} style") for name in LOOKS}
