"""Six looks of the toybox's pictures, each behind a word that the base never met: a LoRA for each,
and an instrument that reads which look a picture has.

See README.md; `python -m benchmarks.styles.train` makes it. Importing this imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .looks import LOOKS, Look

ROOT = Path(__file__).resolve().parent
PLAIN = "plain"
"""The name of no look."""


@dataclass(frozen=True)
class Style:
    """A look, what calls for it in a prompt, and the file that teaches it."""

    name: str
    look: Look
    lora: Path

    @property
    def words(self) -> str:
        """What a caption ends with: "in sketch style"."""
        return f"in {self.name} style"


def styles() -> dict[str, Style]:
    """Every style by its name."""
    folder = ROOT / "weights" / "loras"
    return {name: Style(name, look, folder / f"{name}.safetensors") for name, look in LOOKS.items()}
