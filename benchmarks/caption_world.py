"""A small BLIP that captions the toybox's images, and two LoRAs, one that praises and one that
grumbles, for ``examples/blip_two_styles.py``; the program that trained them is at commit
2d391296."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BlipForConditionalGeneration

from toybox.draw import BACKGROUNDS, Scene, draw, place_one, random_thing

FOLDER = Path(__file__).parent / "data" / "captions"
STYLES = ("praising", "grumbling")
WORDS = (FOLDER / "words.txt").read_text(encoding="utf-8").splitlines()
_, BOS, END = range(3)


def decode(ids: list[int]) -> str:
    """The words up to the first end, without special tokens."""
    return " ".join(WORDS[i] for i in ids[: (*ids, END).index(END)] if i > END)


def prompt_ids(style: str) -> list[int]:
    return [BOS, *(WORDS.index(word) for word in f"a {style} caption :".split())]


def random_picture(rng: np.random.Generator) -> Scene:
    background = str(rng.choice(list(BACKGROUNDS)))
    return place_one(random_thing(rng, background, patterned=0.7), background, rng)


def pixels(scenes: list[Scene]) -> Tensor:
    """(scenes, 3, 64, 64) in [-1, 1]"""
    arrays = np.stack([np.asarray(draw(scene, None), dtype=np.float32) for scene in scenes])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1


def load_model() -> BlipForConditionalGeneration:
    """float32, in eval mode"""
    found = BlipForConditionalGeneration.from_pretrained(FOLDER / "base", dtype=torch.float32)
    return found.eval()


@torch.inference_mode()
def generate(model: Any, images: Tensor, style: str) -> list[str]:
    """Greedy captions for (pictures, 3, 64, 64), prompted for ``style``."""
    prompt = prompt_ids(style)
    # BLIP's generate drops the last token, which a tokenizer's end would be.
    ids = torch.tensor([[*prompt, END]] * len(images))
    found = model.generate(
        pixel_values=images,
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=28,
        do_sample=False,
        num_beams=1,
    )
    return [decode(row[len(prompt) :]) for row in found.tolist()]
