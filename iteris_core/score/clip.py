"""CLIP image and text alignment, as the paper's table 1 measures them, on open_clip models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..errors import IterisError, brief


class ClipScorer:
    """Cosines in the embedding space of one open_clip model, which is kept between calls."""

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        *,
        device: torch.device | str = "cpu",
        batch: int = 64,
    ) -> None:
        self._model = model.to(device).eval()
        self._preprocess = preprocess
        self._tokenizer = tokenizer
        self._device = device
        self._batch = batch

    @classmethod
    def load(
        cls, architecture: str, pretrained: str | None = None, *, device: torch.device | str = "cpu"
    ) -> ClipScorer:
        """Any architecture of open_clip with one of its weight tags or a weights file.

        ``local-dir:FOLDER`` is a model with its weights; another architecture without weights gets
        OpenAI's.
        """
        import open_clip

        if pretrained is None and ":" not in architecture:
            pretrained = "openai"
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained
            )
        except Exception as error:  # the library raises many kinds; the message is what helps
            raise IterisError(
                f"open_clip cannot load {architecture!r} with weights {pretrained!r} "
                f"({brief(error)}); the weights must be of that architecture, in open_clip's names."
            ) from error
        return cls(model, preprocess, open_clip.get_tokenizer(architecture), device=device)  # type: ignore[arg-type]

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors, (images, width), float32, on the CPU."""
        parts: list[Tensor] = []
        for start in range(0, len(images), self._batch):
            some = [self._preprocess(image) for image in images[start : start + self._batch]]
            parts.append(self._model.encode_image(torch.stack(some).to(self._device)))
        return functional.normalize(torch.cat(parts).float().cpu(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, (texts, width), float32, on the CPU."""
        parts: list[Tensor] = []
        for start in range(0, len(texts), self._batch):
            tokens = self._tokenizer(list(texts[start : start + self._batch]))
            parts.append(self._model.encode_text(tokens.to(self._device)))
        return functional.normalize(torch.cat(parts).float().cpu(), dim=-1)

    def image_alignment(
        self, images: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> Tensor:
        """(images,): each picture's mean cosine to the reference pictures of a concept."""
        if not images or not references:
            raise IterisError("Image alignment needs at least one picture and one reference.")
        return (self.embed_images(images) @ self.embed_images(references).mT).mean(dim=1)

    def text_alignment(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(images,): the cosine of each picture to its prompt."""
        if len(images) != len(prompts) or not images:
            raise IterisError(
                f"Text alignment needs one prompt per picture, not {len(prompts)} for "
                f"{len(images)}."
            )
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(dim=1)


def clip_score(cosine: Tensor) -> Tensor:
    """CLIPScore's scale, 2.5 · max(cos, 0) (Hessel et al. 2021)."""
    return 2.5 * cosine.clamp(min=0)


def without_tokens(prompt: str, tokens: Sequence[str]) -> str:
    """The prompt without rare tokens, which mean nothing to CLIP: "a sks1 star" → "a star"."""
    return " ".join(word for word in prompt.split() if word not in set(tokens))
