"""DINO image alignment, on the vision models of transformers (Dinov2, DINO ViT-S/16)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..errors import IterisError, brief


class DinoScorer:
    """Cosines of class tokens; harder on identity than CLIP, blind to text."""

    def __init__(
        self, model: Any, processor: Any, *, device: torch.device | str = "cpu", batch: int = 64
    ) -> None:
        self._model = model.to(device).eval()
        self._processor = processor
        self._device = device
        self._batch = batch

    @classmethod
    def load(
        cls, name: str = "facebook/dinov2-small", *, device: torch.device | str = "cpu"
    ) -> DinoScorer:
        """A hub name or a folder with a model and an image processor."""
        from transformers import AutoImageProcessor, AutoModel

        try:
            processor = AutoImageProcessor.from_pretrained(name)
            model = AutoModel.from_pretrained(name, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise IterisError(f"The DINO model {name!r} cannot be loaded ({brief(error)}).") from (
                error
            )
        return cls(model, processor, device=device)

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors, (images, width), float32, on the CPU."""
        parts: list[Tensor] = []
        for start in range(0, len(images), self._batch):
            some = [image.convert("RGB") for image in images[start : start + self._batch]]
            pixels = self._processor(images=some, return_tensors="pt").to(self._device)
            parts.append(self._model(**pixels).last_hidden_state[:, 0])
        return functional.normalize(torch.cat(parts).float().cpu(), dim=-1)

    def image_alignment(
        self, images: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> Tensor:
        """(images,): each picture's mean cosine to the reference pictures of a concept."""
        if not images or not references:
            raise IterisError("Image alignment needs at least one picture and one reference.")
        return (self.embed_images(images) @ self.embed_images(references).mT).mean(dim=1)
