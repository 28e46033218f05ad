"""The world of pictures that are asked for through MiniLM, four concepts of which are merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import minilm
from minilm.prompts import Kind, prompts, templates
from PIL import Image

import toybox
from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost

from .drawing import draw
from .world import Wanted


class MiniLmWorld:
    """Four concepts, one at a time in a picture."""

    def __init__(self) -> None:
        self.pipeline = minilm.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self._concepts = minilm.concepts()
        self.subjects = tuple(self._concepts)
        self.calibration: dict[str, Any] = {"templates": templates()}
        self.judge = toybox.load_judge()
        self._loras: dict[str, Lora] = {}

    def concepts(self, names: Sequence[str], trained: int = 0) -> list[Concept]:
        for name in names:
            if name not in self._loras:
                self._loras[name] = self.host.read_lora(self._concepts[name].lora)
        return [
            Concept(self._loras[n], trigger=n, class_word=self._concepts[n].class_word)
            for n in names
        ]

    def asked(self, name: str, kind: Kind, count: int, seed: int = 1) -> list[Wanted]:
        """``count`` pictures of one concept by prompts of a kind."""
        found = prompts(self._concepts[name], kind, count)
        return [Wanted((name,), p.text, seed, p.background) for p in found]

    def draw(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Image.Image]:
        sampling = minilm.world()["sampling"]
        return draw(
            self.pipeline,
            self.host,
            lora,
            wanted,
            num_inference_steps=sampling["steps"],
            guidance_scale=sampling["guidance"],
        )

    def read(
        self, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[tuple[float, bool]]:
        """Of each picture the share of shape, pattern and both colours that is read rightly, and
        whether the background is what was asked for."""
        return [
            (
                sum(seen.matches(self._concepts[one.shown[0]].thing)) / 4,
                seen.background == one.scene,
            )
            for seen, one in zip(self.judge.read(images), wanted, strict=True)
        ]
