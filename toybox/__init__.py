"""A small text-to-image world: a miniature Stable Diffusion, LoRAs that teach it concepts, and two
instruments that read its images. See README.md; `python -m toybox.train` rebuilds it.

Importing this package imports neither torch nor diffusers; the `load_*` functions do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .draw import BACKGROUNDS, COLORS, PATTERNS, SHAPES, Thing, describe

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

    from .judge import Judge

__all__ = [
    "BASE",
    "PAIR_TEMPLATES",
    "ROOT",
    "TEMPLATES",
    "ToyConcept",
    "concepts",
    "load_clip",
    "load_judge",
    "load_pipeline",
    "pivotal_concepts",
    "settings",
]

ROOT = Path(__file__).resolve().parent
BASE = ROOT / "weights" / "base"
# Alone, and beside plain things: with prompts of one thing only, pictures of two come out worse.
TEMPLATES = tuple((ROOT / "templates.txt").read_text(encoding="utf-8").splitlines())
PAIR_TEMPLATES = tuple((ROOT / "pairs.txt").read_text(encoding="utf-8").splitlines())


@dataclass(frozen=True)
class ToyConcept:
    """A concept unknown to the base, its token, and the files that teach it.

    `instance_prompt` is its training prompt, "a sks1 star". A pivotal concept also has `embedding`,
    for `pipeline.load_textual_inversion`; otherwise that is None.
    """

    token: str
    class_word: str
    pattern: str
    color1: str
    color2: str
    lora: Path
    embedding: Path | None
    references: tuple[Path, ...]
    instance_prompt: str

    @property
    def thing(self) -> Thing:
        """What a perfect image of it shows."""
        return Thing(self.class_word, self.color1, self.pattern, self.color2)

    @property
    def description(self) -> str:
        """A plain description for CLIP: 'red star with yellow stripes'."""
        return describe(self.thing)

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """The backgrounds that differ from both of its colours."""
        return tuple(b for b in BACKGROUNDS if b not in (self.color1, self.color2))


@lru_cache
def _world(root: Path = ROOT) -> dict[str, Any]:
    return json.loads((root / "world.json").read_text(encoding="utf-8"))


def _read(kind: str, root: Path = ROOT, loras: str = "loras") -> dict[str, ToyConcept]:
    found = {}
    folder = root / "weights" / loras
    for entry in _world(root)[kind]:
        token = entry["token"]
        name = token.strip("<>")
        embedding = folder / f"{name}_embedding.safetensors"
        found[token] = ToyConcept(
            token=token,
            class_word=entry["class_word"],
            pattern=entry["pattern"],
            color1=entry["color1"],
            color2=entry["color2"],
            lora=folder / f"{name}.safetensors",
            embedding=embedding if kind == "pivotal_concepts" else None,
            references=tuple(sorted((root / "references" / name).glob("*.png"))),
            instance_prompt=f"a {token} {entry['class_word']}",
        )
    return found


def concepts(root: Path = ROOT, loras: str = "loras") -> dict[str, ToyConcept]:
    """The ten DreamBooth concepts by token, sks1 to sks10.

    Other concepts on the same base come from a `root` laid out like this package: world.json,
    `references/`, and LoRAs in the folder `loras` of its `weights/`.
    """
    return _read("concepts", root, loras)


def pivotal_concepts() -> dict[str, ToyConcept]:
    """The two concepts learned by pivotal tuning (an embedding and a LoRA), by token."""
    return _read("pivotal_concepts")


def settings() -> dict[str, Any]:
    """`guidance`, `steps` and `size` to sample with, and the world's words."""
    return {
        **_world()["sampling"],
        "backgrounds": list(BACKGROUNDS),
        "colors": list(COLORS),
        "shapes": list(SHAPES),
        "patterns": list(PATTERNS),
    }


def load_pipeline(dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The base model (float32 unless `dtype` says otherwise), without a progress bar."""
    from .pipeline import load

    return load(BASE, dtype)


def load_clip() -> tuple[Any, Any, Any]:
    """(model, preprocess, tokenizer) of the world's own open_clip model, in eval mode."""
    from .clip import load

    return load(ROOT / "weights" / "clip")


def load_judge() -> Judge:
    """The classifier of drawn attributes."""
    from .judge import load

    return load(ROOT / "weights" / "judge")
