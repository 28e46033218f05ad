"""A second world, of pictures that others drew: emoji by six artists, a FLUX in miniature that was
trained on them from scratch, and LoRAs of things that it does not know.

See README.md; the programs that made it are at commit 2d391296. Importing this imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .words import world

ROOT = Path(__file__).resolve().parent
BASE = ROOT / "weights" / "base"


@dataclass(frozen=True)
class Subject:
    """A thing that the base never saw, the word it hides behind, and the file that teaches it."""

    token: str
    name: str
    kind: str
    lora: Path
    references: tuple[Path, ...]

    @property
    def prompt(self) -> str:
        """What it is called: "sks3 fruit"."""
        return f"{self.token} {self.kind}"


def subjects() -> dict[str, Subject]:
    """Every subject by its token."""
    return {
        entry["token"]: Subject(
            entry["token"],
            entry["name"],
            world()["held_out"][entry["name"]]["kind"],
            ROOT / "weights" / "loras" / f"{entry['token']}.safetensors",
            tuple(sorted((ROOT / "references" / entry["token"]).glob("*.png"))),
        )
        for entry in world()["subjects"]
    }


def load_pipeline() -> Any:
    """The base, without a progress bar, in float32."""
    from .pipeline import load

    return load(BASE)


def load_clip() -> tuple[Any, Any, Any]:
    """(model, preprocess, tokenizer) of the world's own open_clip model, in eval mode."""
    from toybox.clip import load

    return load(ROOT / "weights" / "clip")
