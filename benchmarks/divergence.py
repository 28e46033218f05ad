"""How near merges of all four emotion LoRAs are to each LoRA, on texts that no merge saw.

``python benchmarks/divergence.py`` writes ``results/divergence.json``: by the number of texts a
task that merges see, for every method the squared error of the logits relative to the base's and
the KL divergence of the classes from each LoRA's own, means over tasks. The LoRAs were trained on
``training`` texts, but not on ``test`` texts. Two draws of what merges see; what is known stays in
build/divergence.json.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from emotion import TASKS, TEXTS, batches, load_head
from language import METHODS, Bench
from outputs import BUILD, read, result_file, write
from torch import Tensor, nn

from iteris_core import Lora
from iteris_core.score.statistics import over_seeds

CACHE = BUILD / "divergence.json"
SCORED = 200
"""Texts a task of each kind"""
GRID: dict[int, tuple[str, ...]] = {
    50: ("linear", "ssr", "regmean", "iteris", "iteris-shrink"),
    200: ("regmean", "iteris", "iteris-shrink"),
}


class Divergence:
    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.heads = {name: load_head(TASKS[name]) for name in bench.loras}
        most = max(GRID)
        self.texts = {
            "training": {n: _behind(bench.pool[n], most) for n in bench.loras},
            "test": {n: bench.texts[n][0][:SCORED] for n in bench.loras},
        }
        self.own = self._logits(dict(bench.loras))
        self.base = self._logits(dict.fromkeys(bench.loras))

    def measure(self, merged: Lora) -> dict[str, dict[str, float]]:
        ours = self._logits(dict.fromkeys(self.bench.loras, merged))
        found: dict[str, dict[str, float]] = {}
        for kind, by_task in self.own.items():
            errors, divergences = [], []
            for name, own in by_task.items():
                got, base = ours[kind][name], self.base[kind][name]
                errors.append(float((got - own).square().sum() / (base - own).square().sum()))
                divergences.append(
                    float(
                        nn.functional.kl_div(
                            got.log_softmax(-1), own.log_softmax(-1),
                            reduction="batchmean", log_target=True,
                        )
                    )
                )  # fmt: skip
            found[kind] = {"error": fmean(errors), "kl": fmean(divergences)}
        return found

    def _logits(self, loras: dict[str, Lora | None]) -> dict[str, dict[str, Tensor]]:
        """kind → task → (texts, classes)"""
        return {
            kind: {name: self._read(name, loras[name], some) for name, some in texts.items()}
            for kind, texts in self.texts.items()
        }

    @torch.no_grad()
    def _read(self, name: str, lora: Lora | None, texts: Sequence[str]) -> Tensor:
        model, changes = self.bench.model, lora.sites if lora is not None else {}
        weights = {s: model.get_submodule(s.removeprefix("model.")).weight.data for s in changes}
        before = {site: weight.clone() for site, weight in weights.items()}
        kept, model.classifier = model.classifier, self.heads[name]
        try:
            for site, weight in weights.items():
                weight += changes[site].dense().to(weight)
            found = torch.zeros(len(texts), len(TASKS[name].labels))
            for index, batch in batches(self.bench.tokenizer, texts, 64):
                found[index] = model(**batch).logits
            return found.double()
        finally:
            model.classifier = kept
            for site, weight in weights.items():
                weight.copy_(before[site])


def _behind(pool: Sequence[str], most: int) -> list[str]:
    """Texts that no merge of draws 0 and 1 with ``most`` texts sees: see :meth:`Bench.merge`."""
    seen: set[int] = set()
    for seed in (0, 1):
        order = list(range(len(pool)))
        random.Random(seed).shuffle(order)
        seen |= set(order[:most])
    return [text for number, text in enumerate(pool) if number not in seen][:SCORED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=TEXTS)
    arguments = parser.parse_args()
    divergence, known = Divergence(Bench(arguments.data)), read(CACHE)
    data: dict[str, Any] = {}
    for samples, methods in GRID.items():
        for name in methods:
            draws: list[dict[str, dict[str, float]]] = []
            for seed in (0, 1) if name != "linear" else (0,):
                key = f"{name}, {samples} texts, draw {seed}"
                if key not in known:
                    kind, settings = METHODS[name]
                    names = list(divergence.bench.loras)
                    merged = divergence.bench.merge(names, kind, settings, samples, seed)
                    known[key] = divergence.measure(merged)
                    write(CACHE, known)
                    print(key, json.dumps(known[key]), flush=True)
                draws.append(known[key])
            data.setdefault(str(samples), {})[name] = {
                texts: {
                    column: over_seeds(
                        [draw[texts][column] for draw in draws], range(len(draws))
                    ).to_dict()
                    for column in ("error", "kl")
                }
                for texts in ("training", "test")
            }
    write(result_file("divergence.json"), data)


if __name__ == "__main__":
    main()
