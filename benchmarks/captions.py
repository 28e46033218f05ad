"""Two caption styles merged in a small BLIP, steered by the prompt (paper, table 2).

Style accuracy of both prompts, BLEU and CIDEr against captions of that style, and the share of
captions that name the picture rightly, for the base without a LoRA, each LoRA alone, rivals and
IterIS; into results/captions.json. Each merge sees 50 prompt and picture pairs a style, and
features are collected while each LoRA writes. The pictures that are captioned, their references and
the pictures that merges see are drawn anew three times; errors are over the draws. What is known
stays in build/captions.json. `python benchmarks/caption_world.py` trains what is merged.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from caption_scores import bleu, cider
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
from outputs import BUILD, read, result_file, write
from rivals import methods

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.hosts.transformers import TransformersHost
from iteris_core.score.statistics import over_seeds

CACHE = BUILD / "captions.json"
METHODS = methods(iterations=6, ridge=8e-7)


class Bench:
    """One draw of all pictures."""

    def __init__(self, pictures: int, draw: int) -> None:
        self.model = load_model()
        self.host = TransformersHost(self.model, generate={"max_new_tokens": 28})
        self.loras = {style: self.host.read_lora(FOLDER / style) for style in STYLES}
        rng = np.random.default_rng(11 + draw)
        self.scenes = [random_picture(rng) for _ in range(pictures)]
        self.images = pixels(self.scenes)
        self.references = {
            style: [
                [str(text) for text in rng.choice(references(scene, style), 5, replace=False)]
                for scene in self.scenes
            ]
            for style in STYLES
        }
        self.calibration = {
            style: pixels([random_picture(rng) for _ in range(400)]) for style in STYLES
        }

    def concepts(self, samples: int) -> list[Concept]:
        concepts = []
        for style in STYLES:
            ids = torch.tensor([[*prompt_ids(style), END]] * samples)
            batch = {
                "pixel_values": self.calibration[style][:samples],
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
            }
            concepts.append(Concept(self.loras[style], trigger=style, inputs=[batch]))
        return concepts

    def merge(self, method: str, settings: Mapping[str, Any], samples: int) -> Lora:
        return merge_loras(
            self.host,
            self.concepts(samples),
            method,
            settings=dict(settings),
            calibration=Calibration(samples=samples),
        ).lora

    def score(self, lora: Lora | None) -> dict[str, Any]:
        model = copy.deepcopy(self.model)
        for site, change in (lora.sites if lora is not None else {}).items():
            weight = model.get_submodule(site.removeprefix("model.")).weight
            weight.data += change.dense().to(weight)
        accuracy, content, ciders, bleus, examples = {}, [], [], [], {}
        for style in STYLES:
            captions = generate(model, self.images, style)
            accuracy[style] = fmean(style_of(caption) == style for caption in captions)
            content += [
                plain_caption(scene)[2:] in caption
                for scene, caption in zip(self.scenes, captions, strict=True)
            ]
            ciders.append(cider(captions, self.references[style]))
            bleus.append(bleu(captions, self.references[style]))
            examples[style] = captions[:3]
        found = {
            "accuracy": {style: round(value, 4) for style, value in accuracy.items()},
            "cider": round(fmean(ciders), 4),
            "bleu": [round(fmean(pair), 4) for pair in zip(*bleus, strict=True)],
            "content": round(fmean(content), 4),
            "examples": examples,
        }
        return found


def style_of(caption: str) -> str | None:
    """The style whose words are in the caption; None where there is none, or both are."""
    words = set(caption.split())
    found = [style for style in STYLES if words & set(MARKS[style])]
    return found[0] if len(found) == 1 else None


def rows(bench: Bench, names: Sequence[str], samples: int, draw: int) -> dict[str, Any]:
    """Row → scores of one draw, with those that are known."""
    known = read(CACHE)

    def scored(name: str) -> dict[str, Any]:
        key = f"{name}, {len(bench.scenes)} pictures, {samples} samples, draw {draw}"
        if key not in known:
            if name in METHODS:
                kind, settings = METHODS[name]
                torch.manual_seed(draw)
                lora = bench.merge(kind, settings, samples)
            else:
                lora = bench.loras.get(name.removesuffix(" alone"))
            known[key] = bench.score(lora)
            write(CACHE, known)
            print(key, json.dumps(known[key]), flush=True)
        return known[key]

    return {name: scored(name) for name in ("base", *(f"{s} alone" for s in STYLES), *names)}


def total(draws: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """column → mean and standard error over the draws, and captions of the first."""

    def of(values: Sequence[float]) -> dict[str, float | None]:
        return over_seeds(values, range(len(values))).to_dict()

    return {
        **{style: of([draw["accuracy"][style] for draw in draws]) for style in STYLES},
        **{name: of([draw[name] for draw in draws]) for name in ("cider", "content")},
        **{f"bleu-{n}": of([draw["bleu"][n - 1] for draw in draws]) for n in (1, 2, 3, 4)},
        "examples": draws[0]["examples"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    names, usual = arguments.methods.split(","), parser.parse_args([])
    found = [
        rows(Bench(arguments.pictures, draw), names, arguments.samples, draw)
        for draw in range(arguments.draws)
    ]
    data = {
        "methods": {name: total([draw[name] for draw in found]) for name in found[0]},
        "settings": {name: METHODS[name][1] for name in names},
        "pictures": arguments.pictures,
        "samples": arguments.samples,
        "draws": arguments.draws,
    }
    write(result_file("captions.json", whole=arguments == usual), data)


if __name__ == "__main__":
    main()
