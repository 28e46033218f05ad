"""How near a merge of all four emotion LoRAs comes to each LoRA alone, on texts it did not see.

    python benchmarks/language_held_out.py      results/language_held_out.json

On 200 training texts a task: squared error of the logits, relative to the base's, and the KL
divergence of the classes' probabilities; means over the tasks. Test texts and labels are not used,
so that a setting may be chosen by it: `iteris-shrink` of language.py has the smallest error.
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
from torch.nn.functional import kl_div

from iteris_core import Lora

HELD = 200
GRID: list[tuple[str, dict[str, Any], int]] = [
    ("average", {}, 50),
    ("regmean", {}, 50),
    *(("iteris", {"shrink": s}, 50) for s in (1.0, 0.5, 0.7, 0.3)),
    ("regmean", {}, 200),
    ("iteris", {"shrink": 0.8}, 200),
]


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
        squared: list[float] = []
        divergence: list[float] = []
        for name, own in self.own.items():
            found = self.logits(name, lora)
            gap = (found - own).square().sum() / (self.base[name] - own).square().sum()
            squared.append(float(gap))
            pair = found.log_softmax(-1), own.log_softmax(-1)
            divergence.append(float(kl_div(*pair, log_target=True, reduction="batchmean")))
        return {"squared": round(fmean(squared), 4), "kl": round(fmean(divergence), 4)}


def main() -> None:
    held = HeldOut(Bench(TEXTS))
    results: list[dict[str, Any]] = []
    for method, settings, samples in GRID:
        lora = held.bench.merge(tuple(TASKS), method, settings, samples, 0)
        row = {"method": method, **settings, "samples": samples, **held.errors(lora)}
        results.append(row)
        print(row, flush=True)
        text = json.dumps(results, indent=1) + "\n"
        (RESULTS / "language_held_out.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
