"""What the protocol asks of a world of concepts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost


@dataclass(frozen=True)
class Wanted:
    """A picture to draw: what it should show, from left to right, or a subject and its style; and
    the background that its prompt requests, as :meth:`World.read` reads it."""

    shown: tuple[str, ...]
    prompt: str
    seed: int
    scene: str = ""


KINDS = ("seen", "new words", "no trigger", "spread")
FIGURES = ("likeness", "judge", "text", "scene")
"""Kinds of prompt, and figures of a picture that shows a concept."""


class World(Protocol):
    """Concepts with LoRAs and references, a pipeline that draws them, and judges of pictures.

    Concepts go by their names. ``trained`` is how many LoRAs each concept has, of other training
    seeds. ``half`` holds fields of the calibration of a merge. No row has one of ``words``.

    ``kinds`` are kinds of prompt. ``seen``: from templates that calibration rows have. ``new
    words``: each has one of ``words``. ``no trigger``: prompts of the base's own. ``spread``:
    several seeds of one prompt with new words. ``quality`` has no pictures of its own.
    """

    host: DiffusersHost
    subjects: Sequence[str]
    trained: int
    half: Mapping[str, Any]
    words: Set[str]
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

    def pictures_of(self, name: str) -> Sequence[Image.Image]:
        """The concept's own pictures."""
        ...

    def embedded(self, images: Sequence[Image.Image]) -> Tensor:
        """(picture, feature): unit vectors by the world's CLIP."""
        ...
