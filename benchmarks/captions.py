"""Two caption styles merged in a small BLIP, steered by the prompt (paper, table 2).

Writes to results/captions.json, for the base without a LoRA, each LoRA alone, rivals and IterIS:
style accuracy for both prompts, CIDEr against captions of that style, and the share of captions
that name the image correctly. Each merge sees 50 prompt-image pairs per style, and features are
collected while each LoRA writes. The captioned images, their references and the merges' images are
drawn three times; errors are over the draws. Finished results are cached in build/captions.json.
`python benchmarks/caption_world.py` trains the LoRAs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from caption_scores import cider
from caption_world import (
    END,
    FOLDER,
    MARKS,
    STYLES,
    generate,
    load_model,
    pixels,
    plain_caption,
    prompt_ids,
    random_picture,
    references,
)
from outputs import BUILD, QUICK, read, result_file, write
from rivals import METHODS as USUAL

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.hosts.transformers import TransformersHost
from iteris_core.score.statistics import over_seeds

CACHE = BUILD / "captions.json"
PAPER = {
    "objective": "adapter",
    "schedule": "jacobi",
    "iterations": 6,
    "weighting": "adapter",
    "ridge": 8e-7,
}
METHODS = {**USUAL, "iteris-paper": ("iteris", PAPER)}
"""With Algorithm 1, the paper's iterations and its α of this task."""
ROWS = ("base", *(f"{style} alone" for style in STYLES), *METHODS)
PICTURES, SAMPLES, DRAWS = (4, 2, 1) if QUICK else (200, 50, 3)


class Bench:
    """One draw of all images."""

    def __init__(self, draw: int) -> None:
        self.draw = draw
        self.model = load_model()
        self.host = TransformersHost(self.model, generate={"max_new_tokens": 28})
        self.loras = {style: self.host.read_lora(FOLDER / style) for style in STYLES}
        rng = np.random.default_rng(11 + draw)
        self.scenes = [random_picture(rng) for _ in range(PICTURES)]
        self.images = pixels(self.scenes)
        self.references = {
            style: [
                [str(text) for text in rng.choice(references(scene, style), 5, replace=False)]
                for scene in self.scenes
            ]
            for style in STYLES
        }
        self.calibration = {
            style: pixels([random_picture(rng) for _ in range(400)][:SAMPLES]) for style in STYLES
        }

    def merge(self, method: str, settings: Mapping[str, Any]) -> Lora:
        concepts: list[Concept] = []
        for style in STYLES:
            ids = torch.tensor([[*prompt_ids(style), END]] * SAMPLES)
            batch = {
                "pixel_values": self.calibration[style],
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
            }
            concepts.append(Concept(self.loras[style], trigger=style, inputs=[batch]))
        torch.manual_seed(self.draw)
        calibration = Calibration(samples=SAMPLES)
        return merge_loras(
            self.host, concepts, method, settings=dict(settings), calibration=calibration
        ).lora

    def score(self, lora: Lora | None) -> dict[str, Any]:
        model = copy.deepcopy(self.model)
        for site, change in (lora.sites if lora is not None else {}).items():
            weight = model.get_submodule(site.removeprefix("model.")).weight
            weight.data += change.dense().to(weight)
        accuracy, content, ciders, examples = {}, [], [], {}
        for style in STYLES:
            captions = generate(model, self.images, style)
            accuracy[style] = round(fmean(style_of(caption) == style for caption in captions), 4)
            content += [
                plain_caption(scene)[2:] in caption
                for scene, caption in zip(self.scenes, captions, strict=True)
            ]
            ciders.append(cider(captions, self.references[style]))
            examples[style] = captions[:3]
        return {
            **accuracy,
            "cider": round(fmean(ciders), 4),
            "content": round(fmean(content), 4),
            "examples": examples,
        }

    def row(self, name: str) -> dict[str, Any]:
        """The scores of a method, a LoRA alone or the base; from the cache if possible."""
        key = f"{name}, {PICTURES} pictures, {SAMPLES} samples, draw {self.draw}"
        known = read(CACHE)
        if key not in known:
            alone = self.loras.get(name.removesuffix(" alone"))
            found = self.score(self.merge(*METHODS[name]) if name in METHODS else alone)
            write(CACHE, {**known, key: found})
            print(key, json.dumps(found), flush=True)
        return read(CACHE)[key]


def style_of(caption: str) -> str | None:
    """The style whose words are in the caption; None if there is none, or both occur."""
    words = set(caption.split())
    found = [style for style in STYLES if words & MARKS[style]]
    return found[0] if len(found) == 1 else None


def total(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Column → mean and standard error over the draws, and captions of the first."""
    return {
        name: over_seeds([draw[name] for draw in draws], range(len(draws))).to_dict()
        for name in (*STYLES, "cider", "content")
    } | {"examples": draws[0]["examples"]}


def main() -> None:
    benches = [Bench(draw) for draw in range(DRAWS)]
    data = {
        "methods": {name: total([bench.row(name) for bench in benches]) for name in ROWS},
        "settings": {name: settings for name, (_, settings) in METHODS.items()},
        "pictures": PICTURES,
        "samples": SAMPLES,
        "draws": DRAWS,
    }
    write(result_file("captions.json"), data)


if __name__ == "__main__":
    main()
