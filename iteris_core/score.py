"""Scores of images: CLIP alignment, as in the paper's table 1; and a sheet of images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from .errors import ScoreError, brief


class ImageScorer:
    """Cosines in the embedding space of one model, which is kept between calls."""

    def __init__(self, model: Any, device: torch.device | str, batch: int) -> None:
        self._model = model.to(device).eval()
        self._device = device
        self._batch = batch

    @abstractmethod
    def _embed_images(self, images: list[Image.Image]) -> Tensor: ...

    @torch.no_grad()
    def _units(self, items: Sequence[Any], embed: Callable[[list[Any]], Tensor]) -> Tensor:
        starts = range(0, len(items), self._batch)
        parts = [embed(list(items[start : start + self._batch])) for start in starts]
        return functional.normalize(torch.cat(parts).float().cpu(), dim=-1)

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors, (images, width), float32, on the CPU."""
        return self._units(images, self._embed_images)

    def image_alignment(
        self, images: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> Tensor:
        """(images,): each image's mean cosine to the ``references``, images of a concept."""
        if not images or not references:
            raise ScoreError("Image alignment needs at least one image and one reference.")
        return (self.embed_images(images) @ self.embed_images(references).mT).mean(dim=1)


class ClipScorer(ImageScorer):
    """Cosines in the embedding space of one open_clip model."""

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Image.Image], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        *,
        device: torch.device | str = "cpu",
        batch: int = 64,
    ) -> None:
        super().__init__(model, device, batch)
        self._preprocess = preprocess
        self._tokenizer = tokenizer

    @classmethod
    def load(
        cls, architecture: str, pretrained: str | None = None, *, device: torch.device | str = "cpu"
    ) -> ClipScorer:
        """Load any open_clip ``architecture`` onto a ``device``, with ``pretrained`` as one of its
        weight tags or a weights file.

        ``local-dir:FOLDER`` is a model with its weights; any other architecture without weights
        gets OpenAI's.
        """
        import open_clip

        if pretrained is None and ":" not in architecture:
            pretrained = "openai"
        try:
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained
            )
        except Exception as error:  # the library raises many types; its message is what helps
            raise ScoreError(
                f"open_clip cannot load {architecture!r} with weights {pretrained!r} "
                f"({brief(error)}); the weights must be for that architecture, with open_clip's "
                "names."
            ) from error
        return cls(model, preprocess, open_clip.get_tokenizer(architecture), device=device)  # type: ignore[arg-type]

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        pixels = torch.stack([self._preprocess(image) for image in images])
        return self._model.encode_image(pixels.to(self._device))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, (texts, width), float32, on the CPU."""
        return self._units(
            texts, lambda chunk: self._model.encode_text(self._tokenizer(chunk).to(self._device))
        )

    def text_alignment(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """(images,): the cosine of each image to its prompt among ``prompts``."""
        if len(images) != len(prompts) or not images:
            raise ScoreError(
                f"Text alignment needs one prompt per image, not {len(prompts)} for {len(images)}."
            )
        return (self.embed_images(images) * self.embed_texts(prompts)).sum(dim=1)


def clip_score(cosine: Tensor) -> Tensor:
    """CLIPScore's scale, 2.5 · max(``cosine``, 0), of any shape (Hessel et al. 2021)."""
    return 2.5 * cosine.clamp(min=0)


def without_tokens(prompt: str, tokens: Sequence[str]) -> str:
    """The prompt without rare tokens, which mean nothing to CLIP: "a sks1 star" → "a star"."""
    return " ".join(word for word in prompt.split() if word not in set(tokens))


def contact_sheet(
    rows: Mapping[str, Sequence[Image.Image | None]],
    columns: Sequence[str],
    *,
    cell: int = 128,
    title: str = "",
) -> Image.Image:
    """One row per label of ``rows``, one column per label of ``columns``; None leaves a gap.

    ``title`` stands above. Images are scaled to ``cell`` pixels; column labels wrap to that width.
    """
    small, large = ImageFont.load_default(12), ImageFont.load_default(16)
    gap, left = 4, 8 + max(int(large.getlength(label)) for label in rows)
    labels = [_wrapped(label, small, cell) for label in columns]
    heading = 28 if title else 8
    top = heading + 15 * max(len(lines) for lines in labels) + 6
    width = left + len(columns) * (cell + gap) + 4
    sheet = Image.new("RGB", (width, top + len(rows) * (cell + gap) + 4), "white")
    pen = ImageDraw.Draw(sheet)
    if title:
        pen.text((8, 5), title, fill="black", font=large)
    for index, lines in enumerate(labels):
        x = left + index * (cell + gap)
        for number, line in enumerate(lines):
            pen.text((x, heading + 15 * number), line, fill="#333", font=small)
    for row, (label, pictures) in enumerate(rows.items()):
        y = top + row * (cell + gap)
        pen.text((4, y + cell // 2 - 10), label, fill="black", font=large)
        for index, picture in enumerate(pictures):
            if picture is not None:
                scaled = picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS)
                sheet.paste(scaled, (left + index * (cell + gap), y))
    return sheet


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
