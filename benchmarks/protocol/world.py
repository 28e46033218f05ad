"""What the protocol asks of a world of concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost

from .in_a_row import Part


@dataclass(frozen=True)
class Wanted:
    """A picture to draw: what it should show, from left to right, or a subject and its style; and
    the background that its prompt requests, as :meth:`World.read` reads it."""

    shown: tuple[str, ...]
    prompt: str
    seed: int
    scene: str = ""


Judged = Mapping[str, Sequence[float]]
"""judge → a likeness for each picture, from 0 to 1"""


KINDS = ("seen", "new words", "no trigger", "spread")
FIGURES = ("likeness", "judge", "text", "scene")
"""Kinds of prompt, and figures of a picture that shows a concept."""


class World(Protocol):
    """Concepts with LoRAs and references, a pipeline that draws them, and judges of pictures.

    Concepts go by their names. ``trained`` is how many LoRAs each concept has, of other training
    seeds; ``calls`` is how often the denoiser is called for a picture. A merge is calibrated on
    half of the world's templates and drawn on prompts of the other half: ``half`` holds the fields
    of that calibration, ``calibration`` those with all templates.

    ``kinds`` are kinds of prompt. ``seen``: from templates that calibration rows have. ``new
    words``: no word but trigger and class is in any row's template. ``no trigger``: prompts of the
    base's own. ``spread``: several seeds of one prompt with new words.

    ``roots`` are the folders of its weights and words.
    """

    host: DiffusersHost
    roots: Sequence[Path]
    subjects: Sequence[str]
    sizes: Sequence[int]
    trained: int
    calls: int
    calibration: Mapping[str, Any]
    half: Mapping[str, Any]
    kinds: Sequence[str]

    def concepts(self, names: Sequence[str], trained: int) -> list[Concept]:
        """What is merged, with the LoRAs of that training."""
        ...

    def prompted(self, kind: str, names: Sequence[str], seed: int) -> list[Wanted]:
        """Pictures of each of ``names`` by prompts of that kind. ``no trigger`` shows none of
        them, and has the same prompts whatever the names are."""
        ...

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        """The pictures with the LoRA, or of the base model; always the same ones."""
        ...

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[Mapping[str, float]]:
        """Figures of each picture, from 0 to 1. ``scene``: whether the background is the requested
        one. Where a concept is shown, ``likeness`` to its references, ``judge``, how much of it
        another instrument recognises, and ``text``."""
        ...

    def embedded(self, images: Sequence[Image.Image]) -> Tensor:
        """(picture, feature): unit vectors by the world's CLIP."""
        ...


class RowWorld(World, Protocol):
    """A world whose pictures can be drawn region by region, as regional prompts do."""

    def alone(self, name: str, seed: int) -> list[Wanted]:
        """Pictures of one subject, one for each of some prompts."""
        ...

    def likeness(self, images: Sequence[Image.Image], names: Sequence[str]) -> Judged:
        """Each picture's mean likeness to all references of the concept of its place in
        ``names``."""
        ...

    def text_alignment(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> Sequence[float]:
        """Each picture's alignment to its prompt without rare tokens."""
        ...

    def rows(self, names: Sequence[str], count: int, seed: int) -> list[Wanted]:
        """Pictures of each ``count`` neighbours of ``names`` side by side."""
        ...

    def prompts_of_regions(self, wanted: Sequence[Wanted]) -> list[list[str]]:
        """For each region a prompt for each picture, which names its own concept alone."""
        ...

    def draw_row(self, parts: Sequence[Part], wanted: Sequence[Wanted]) -> list[Image.Image]:
        """The pictures, each region denoised by its part; half a picture wide each."""
        ...

    def row_read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[tuple[float, bool]]:
        """What share of each picture is right in its regions, and whether all concepts are
        there."""
        ...
