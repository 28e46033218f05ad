"""How near a merge of all four emotion LoRAs comes to each LoRA alone, on texts it did not see.

    python benchmarks/language_held_out.py      results/language_held_out.json

Squared error of the logits on 200 training texts a task, relative to the base's; the mean over the
tasks. Test texts and labels are not used, so that a setting may be chosen by it: `iteris-shrink` of
language.py is the best of the first grid.
"""

from __future__ import annotations

import json
import random
from statistics import fmean
from typing import Any

import torch
from emotion import TASKS, TEXTS, batches, read_texts
from language import RESULTS, Bench
from torch import Tensor

from iteris_core import Lora

HELD = 200
GRIDS: dict[str, tuple[str, list[dict[str, Any]], int]] = {
    "iteris, shrink": ("iteris", [{"shrink": s} for s in (1.0, 0.9, 0.7, 0.5, 0.3)], 50),
    "iteris, ridge": ("iteris", [{"ridge": r} for r in (1e-3, 1e-2)], 50),
    "iteris, shrink, no repair": ("iteris", [{"shrink": 0.5, "repair": False}], 50),
    "regmean, shrink": ("regmean", [{"shrink": s} for s in (1.0, 0.9, 0.7, 0.5)], 50),
    "regmean++": ("regmean++", [{}], 50),
    "ssr": ("ssr", [{}], 50),
    "linear": ("average", [{}], 50),
    "iteris, 200 texts": ("iteris", [{"shrink": s} for s in (1.0, 0.9, 0.7, 0.5)], 200),
    "regmean, 200 texts": ("regmean", [{}], 200),
}


class HeldOut:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.texts: dict[str, list[str]] = {}
        for name, task in TASKS.items():
            texts, _ = read_texts(task, "train", TEXTS)
            order = list(range(len(texts)))
            random.Random(0).shuffle(order)
            self.texts[name] = [texts[i] for i in order[400 : 400 + HELD]]
        self.own = {name: self.logits(name, bench.loras[name]) for name in TASKS}
        self.base = {name: self.logits(name, None) for name in TASKS}

    @torch.inference_mode()
    def logits(self, name: str, lora: Lora | None) -> Tensor:
        model, head = self.bench.model, self.bench.heads[name].float()
        changed = {} if lora is None else lora.sites
        weights = {s: model.get_submodule(s.removeprefix("model.")).weight for s in changed}
        kept = {site: weight.data for site, weight in weights.items()}
        for site, weight in weights.items():
            weight.data = weight.data + changed[site].dense().float()
        found = torch.empty(HELD, head.out_features)
        plain, model.classifier = model.classifier, head
        for rows, batch in batches(self.bench.tokenizer, self.texts[name], 50):
            found[rows] = model(**batch).logits
        model.classifier = plain
        for site, weight in weights.items():
            weight.data = kept[site]
        return found

    def errors(self, lora: Lora) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, own in self.own.items():
            gap = (self.logits(name, lora) - own).square().sum()
            found[name] = round(float(gap / (self.base[name] - own).square().sum()), 4)
        return {"mean": round(fmean(found.values()), 4), **found}


def main() -> None:
    bench = Bench(TEXTS)
    held = HeldOut(bench)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for label, (method, grid, samples) in GRIDS.items():
        results[label] = {}
        for settings in grid:
            lora = bench.merge(tuple(TASKS), method, settings, samples, 0)
            errors = results[label][json.dumps(settings)] = held.errors(lora)
            print(label, settings, errors, flush=True)
            (RESULTS / "language_held_out.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
