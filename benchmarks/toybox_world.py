"""The toybox, loaded once: what is merged, drawn and scored."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image
from protocol.drawing import Drawn, changed, draw

import toybox
from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score import ClipScorer


class World:
    """The toybox, loaded once: draws and scores. ``root`` is a folder with other concepts."""

    def __init__(self, root: Path = toybox.ROOT) -> None:
        self.pipeline = toybox.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self.concepts = toybox.concepts(root)
        self.loras = {t: self.host.read_lora(c.lora) for t, c in self.concepts.items()}
        self.judge = toybox.load_judge()
        self.scorer = ClipScorer(*toybox.load_clip())
        self.settings = toybox.settings()
        self.references = {
            token: self.scorer.embed_images([Image.open(f).convert("RGB") for f in c.references])
            for token, c in self.concepts.items()
        }

    def merged_concepts(self, numbers: Sequence[int]) -> list[Concept]:
        tokens = [f"sks{number}" for number in numbers]
        return [Concept(self.loras[t], None, t, self.concepts[t].class_word) for t in tokens]

    def draw(self, lora: Lora | None, pictures: Sequence[Drawn]) -> list[Image.Image]:
        return draw(
            self.pipeline,
            self.host,
            lora,
            pictures,
            num_inference_steps=self.settings["steps"],
            guidance_scale=self.settings["guidance"],
        )

    def changed(self, lora: Lora | None) -> AbstractContextManager[None]:
        """The LoRA's changes added to the weights, which are put back bit for bit."""
        return changed(self.host, lora)
