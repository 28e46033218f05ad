"""A small BLIP that captions the toybox's images, and two LoRAs, one that praises and one that
grumbles.

`python benchmarks/caption_world.py` trains what is missing in benchmarks/data/captions: the base,
from scratch, on plain captions (two fifths of them with a style's words, whatever the prompt asks
for, so that the base knows the words but not what the prompts mean), then one LoRA a style on the
self-attention of its text decoder, as in the paper (B.2). Each LoRA sees only its own prompt.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration

from toybox.draw import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    SIZE,
    Scene,
    describe,
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


def _marks(style: str, other: str) -> set[str]:
    words, others = ({w for t in TEMPLATES[of] for w in t.split()} for of in (style, other))
    return words - others - {"an"}


MARKS = {style: _marks(style, other) for style, other in (STYLES, STYLES[::-1])}
"""Words that only this style has."""

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


def plain_caption(scene: Scene) -> str:
    return f"a {_content(scene)}"


def styled_caption(scene: Scene, style: str, rng: np.random.Generator) -> str:
    return str(rng.choice(TEMPLATES[style])).format(_content(scene))


def references(scene: Scene, style: str) -> list[str]:
    return [template.format(_content(scene)) for template in TEMPLATES[style]]


def _content(scene: Scene) -> str:
    return f"{describe(scene.placed[0].thing)} on a {scene.background} background"


def pixels(scenes: list[Scene], rng: np.random.Generator | None = None) -> Tensor:
    """(scenes, 3, 64, 64) in [-1, 1]"""
    arrays = np.stack([np.asarray(draw(scene, rng), dtype=np.float32) for scene in scenes])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1


def new_model() -> BlipForConditionalGeneration:
    common = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4}
    ends = {
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": END, "sep_token_id": END,
    }  # fmt: skip
    text = {
        **common, **ends, "vocab_size": len(WORDS), "encoder_hidden_size": 96,
        "num_hidden_layers": 4, "max_position_embeddings": 40,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "label_smoothing": 0.0,
    }  # fmt: skip
    vision = {**common, "num_hidden_layers": 3, "image_size": SIZE, "patch_size": 8}
    return BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    )


def load_model(folder: Path = FOLDER) -> BlipForConditionalGeneration:
    """float32, in eval mode"""
    found = BlipForConditionalGeneration.from_pretrained(folder / "base", dtype=torch.float32)
    return found.eval()


def teacher_batch(
    images: Tensor, prompts: list[str], captions: list[str]
) -> tuple[dict[str, Tensor], Tensor]:
    """(model inputs, labels); labels are -100 on prompts and padding."""
    rows, labels = [], []
    for prompt, text in zip(prompts, captions, strict=True):
        start, rest = prompt_ids(prompt), [*encode(text), END]
        rows.append(start + rest)
        labels.append([-100] * len(start) + rest)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    target = torch.tensor([row + [-100] * (longest - len(row)) for row in labels])
    batch = {
        "pixel_values": images,
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
    }
    return batch, target


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


def loss_of(model: nn.Module, batch: dict[str, Tensor], target: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**batch).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), target[:, 1:].flatten()
    )


def fit(model: Any, make_batch: Any, *, steps: int, rate: float, name: str) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 100) * max(0.02, 1 - step / steps)
    )
    model.train()
    started = time.time()
    losses: list[float] = []
    for step in range(1, steps + 1):
        loss = loss_of(model, *make_batch())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            mean = sum(losses[-100:]) / 100
            print(f"{name} {step} loss {mean:.3f} {time.time() - started:.0f} s", flush=True)
    model.eval()


def train_base(folder: Path, steps: int) -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    model = new_model()
    scenes = [random_picture(rng) for _ in range(8000)]
    images = pixels(scenes, rng)

    def make_batch():
        chosen = rng.choice(len(scenes), 48)
        kinds = rng.choice(["plain", "plain", "plain", *STYLES], len(chosen))
        captions = [
            plain_caption(scenes[i]) if kind == "plain" else styled_caption(scenes[i], kind, rng)
            for i, kind in zip(chosen, kinds, strict=True)
        ]
        prompts = rng.choice(["plain", *STYLES], len(chosen)).tolist()
        return teacher_batch(images[chosen], prompts, captions)

    fit(model, make_batch, steps=steps, rate=1.5e-3, name="base")
    model.half().save_pretrained(folder / "base")


def train_style(style: str, folder: Path, steps: int) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    rng = np.random.default_rng(2)
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=r"text_decoder.*\.attention\.self\.(query|key|value)",
    )
    model = get_peft_model(load_model(folder), config)

    scenes = [random_picture(rng) for _ in range(2000)]
    images = pixels(scenes, rng)

    def make_batch():
        chosen = rng.choice(len(scenes), 32)
        captions = [styled_caption(scenes[i], style, rng) for i in chosen]
        return teacher_batch(images[chosen], [style] * len(chosen), captions)

    fit(model, make_batch, steps=steps, rate=2e-3, name=style)
    model.save_pretrained(folder / style)
    (folder / style / "README.md").unlink(missing_ok=True)
    file = folder / style / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = ""
    file.write_text(json.dumps(config, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--style-steps", type=int, default=300)
    arguments = parser.parse_args()
    folder: Path = arguments.output
    if not (folder / "base").exists():
        train_base(folder, arguments.steps)
    for style in STYLES:
        if not (folder / style).exists():
            train_style(style, folder, arguments.style_steps)


if __name__ == "__main__":
    main()
