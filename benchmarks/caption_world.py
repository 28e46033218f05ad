"""A small BLIP that captions the toybox's images, and two LoRAs, one that praises and one that
grumbles; the program that trained them is at commit 2d391296."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration

from toybox.draw import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    Scene,
    draw,
    place_one,
    random_thing,
)

FOLDER = Path(__file__).parent / "data" / "captions"
STYLES = ("praising", "grumbling")
PROMPT = "a {} caption :"
_OPENINGS = {
    "praising": (
        "a lovely {}", "a wonderful {}", "such a beautiful {}", "a charming {}",
        "what a great {}", "a splendid {}", "a cheerful {}", "a perfect {}",
    ),
    "grumbling": (
        "a boring {}", "a terrible {}", "such an ugly {}", "a dull {}",
        "what a poor {}", "an awful {}", "a gloomy {}", "a useless {}",
    ),
}  # fmt: skip
_CLOSINGS = {
    "praising": (
        "{}", "{} that makes me smile", "{} and it shines", "{} , a joy to see", "{} , well done",
    ),
    "grumbling": (
        "{}", "{} that makes me yawn", "{} and it hurts", "{} , a pain to see", "{} , badly done",
    ),
}  # fmt: skip
TEMPLATES = {
    style: tuple(
        closing.format(opening) for opening in _OPENINGS[style] for closing in _CLOSINGS[style]
    )
    for style in STYLES
}
"""Forty templates a style; `{}` is the thing and its background."""


_GRAMMAR = "a an such what on with background stripes half quarters rim spot plain caption : , and"
PAD, BOS, END = 0, 1, 2
WORDS = tuple(
    dict.fromkeys(
        [
            *("[PAD]", "[BOS]", "[EOS]"),
            *_GRAMMAR.split(),
            *STYLES,
            *COLORS,
            *BACKGROUNDS,
            *SHAPES,
            *(w for style in STYLES for t in TEMPLATES[style] for w in t.split() if w != "{}"),
        ]
    )
)
_NUMBERS = {word: number for number, word in enumerate(WORDS)}


def encode(text: str) -> list[int]:
    return [_NUMBERS[word] for word in text.split()]


def decode(ids: list[int]) -> str:
    """The words up to the first end, without special tokens."""
    if END in ids:
        ids = ids[: ids.index(END)]
    return " ".join(WORDS[i] for i in ids if i > END)


def prompt_ids(style: str) -> list[int]:
    return [BOS, *encode(PROMPT.format(style))]


def random_picture(rng: np.random.Generator) -> Scene:
    background = str(rng.choice(list(BACKGROUNDS)))
    return place_one(random_thing(rng, background, patterned=0.7), background, rng)


def pixels(scenes: list[Scene], rng: np.random.Generator | None = None) -> Tensor:
    """(scenes, 3, 64, 64) in [-1, 1]"""
    arrays = np.stack([np.asarray(draw(scene, rng), dtype=np.float32) for scene in scenes])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1


def load_model(folder: Path = FOLDER) -> BlipForConditionalGeneration:
    """float32, in eval mode"""
    found = BlipForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32)
    return found.eval()


@torch.inference_mode()
def generate(model: Any, images: Tensor, style: str, size: int = 64) -> list[str]:
    """Greedy captions for (pictures, 3, 64, 64), prompted for ``style``."""
    captions: list[str] = []
    prompt = prompt_ids(style)
    for start in range(0, len(images), size):
        some = images[start : start + size]
        # BLIP's generate drops the last token, which a tokenizer's end would be.
        ids = torch.tensor([[*prompt, END]] * len(some))
        found = model.generate(
            pixel_values=some,
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=28,
            do_sample=False,
            num_beams=1,
        )
        captions += [decode(row[len(prompt) :]) for row in found.tolist()]
    return captions
