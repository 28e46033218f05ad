"""Sheets of pictures, to look at while a base trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from toybox.train.common import bf16

from ..pipeline import EmojiPipeline

LOOK = (
    "a cat face on a blue background",
    "a dog face on a white background",
    "a red apple on a gray background",
    "an airplane on a white background",
    "a hamburger on a green background",
    "a sailboat on a pink background",
    "a red heart on a black background",
    "a tree on a yellow background",
    "a camera on a pink background",
    "a turtle on a white background",
    "an ice cream on a blue background",
    "a hammer on a red background",
    "cherries on a gray background",
    "a dress on a black background",
    "a house on a blue background",
    "a snowman on a green background",
    "a trophy on a black background",
    "a fish on a yellow background",
    "a fruit on a white background",
    "an animal on a gray background",
    "a cat face left of a red heart on a white background",
    "a banana left of a star on a blue background",
    "a car left of a house on a green background",
    "a crown above a frog on a pink background",
)


@torch.no_grad()
def look(
    pipeline: EmojiPipeline, prompts: Sequence[str], path: Path, columns: int = 8, seed: int = 5
) -> None:
    """One picture for each prompt, side by side at twice the size."""
    with bf16():
        images = pipeline(list(prompts), generator=torch.Generator().manual_seed(seed)).images
    sheet_of(images, columns).save(path)


def sheet_of(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """The pictures in rows, at twice the size."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * 66, rows * 66), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * 66, i // columns * 66))
    return sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST)
