"""Four emotion LoRAs merged in all 11 ways: macro F1 against rivals (paper, table 3, in-domain).

    python benchmarks/language.py               the table, into results/language.json
    python benchmarks/language.py --ablations   results/language_ablations.json (tables 7 to 10)

Each merge sees 50 unlabelled training texts a task. Every method has the settings that its authors
publish (`iteris`: our defaults); none was tuned on these tasks. What was computed is kept in
build/language.jsonl, line by line, and not computed again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from emotion import (
    ADAPTERS,
    ROOT,
    TASKS,
    TEXTS,
    batches,
    load_encoder,
    load_head,
    load_tokenizer,
    macro_f1,
    predict,
    read_texts,
)

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.hosts.transformers import TransformersHost

RESULTS = ROOT / "results"
CACHE = Path("build/language.jsonl")
SAMPLES = 50
COMBINATIONS = [c for n in (2, 3, 4) for c in itertools.combinations(TASKS, n)]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("average", {}),
    "task-arithmetic": ("task-arithmetic", {}),
    "ties": ("ties", {}),
    "dare": ("dare-linear", {"scale": 0.4}),
    "regmean": ("regmean", {}),
    "ssr": ("ssr", {}),
    "iteris": ("iteris", {}),
    "iteris-paper": (
        "iteris",
        {
            "align": "adapter",
            "schedule": "jacobi",
            "iterations": 10,
            "balance": "adapter",
            "ridge": 1e-7,
        },
    ),
}
"""Name in the table → method and settings; ``iteris-paper`` is Algorithm 1 as the paper sets it."""


class Bench:
    """The encoder, its LoRAs and heads, and the texts."""

    def __init__(self, data: Path) -> None:
        self.model = load_encoder()
        self.tokenizer = load_tokenizer()
        self.host = TransformersHost(self.model)
        self.loras: dict[str, Lora] = {}
        self.heads = {}
        self.calibration: dict[str, list[str]] = {}
        self.texts: dict[str, tuple[list[str], list[int]]] = {}
        for task in TASKS.values():
            self.loras[task.name] = self.host.read_lora(ADAPTERS / task.name.lower())
            self.heads[task.name] = load_head(task).bfloat16()
            texts, _ = read_texts(task, "train", data)
            order = list(range(len(texts)))
            random.Random(0).shuffle(order)
            self.calibration[task.name] = [texts[i] for i in order[:400]]
            self.texts[task.name] = read_texts(task, "test", data)
        self.scored = copy.deepcopy(self.model).bfloat16()  # a quarter of the time
        self.rows = _read_cache()

    def merge(
        self, names: Sequence[str], method: str, settings: Mapping[str, Any], samples: int
    ) -> Lora:
        concepts = []
        for name in names:
            texts = self.calibration[name][:samples]
            inputs = [batch for _, batch in batches(self.tokenizer, texts, 16)]
            concepts.append(Concept(self.loras[name], trigger=name, inputs=inputs))
        found = merge_loras(
            self.host,
            concepts,
            method,
            settings=dict(settings),
            calibration=Calibration(samples=samples),
        )
        return found.lora

    def score(self, lora: Lora, names: Sequence[str]) -> dict[str, float]:
        """Macro F1 of each task with its own head on the encoder with ``lora`` in its weights."""
        plain = dict(self.model.named_modules())
        scored = dict(self.scored.named_modules())
        changes = {site.removeprefix("model."): change for site, change in lora.sites.items()}
        for name, change in changes.items():
            scored[name].weight.data.copy_(plain[name].weight.data + change.dense().float())
        found = {}
        for name in names:
            texts, labels = self.texts[name]
            guessed = predict(self.scored, self.heads[name], self.tokenizer, texts)
            found[name] = macro_f1(labels, guessed, len(TASKS[name].labels))
        for name in changes:
            scored[name].weight.data.copy_(plain[name].weight.data)
        return found

    def row(
        self,
        names: Sequence[str],
        method: str,
        settings: Mapping[str, Any] | None = None,
        *,
        samples: int = SAMPLES,
    ) -> dict[str, float]:
        """F1 of each task after a merge of ``names``; from the cache if it is there."""
        kind, own = METHODS[method]
        settings = {**own, **(settings or {})}
        key = json.dumps([list(names), kind, settings, samples, "test"], sort_keys=True)
        if key not in self.rows:
            self.keep(key, self.score(self.merge(names, kind, settings, samples), names))
        return self.rows[key]

    def alone(self, name: str) -> float:
        key = json.dumps(["alone", name])
        if key not in self.rows:
            self.keep(key, self.score(self.loras[name], [name]))
        return self.rows[key][name]

    def keep(self, key: str, found: dict[str, float]) -> None:
        self.rows[key] = found
        print(round(sum(found.values()), 4), key, flush=True)
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with CACHE.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "f1": found}) + "\n")


def _read_cache() -> dict[str, dict[str, float]]:
    if not CACHE.is_file():
        return {}
    lines = CACHE.read_text(encoding="utf-8").splitlines()
    return {row["key"]: row["f1"] for row in map(json.loads, lines)}


def table(bench: Bench, methods: Sequence[str]) -> dict[str, Any]:
    """Means over the combinations that a task takes part in, and their sum, as in table 3."""
    rows = {
        method: {combination: bench.row(combination, method) for combination in COMBINATIONS}
        for method in methods
    }
    tasks = {
        method: {
            task: round(fmean(f1[task] for names, f1 in found.items() if task in names), 4)
            for task in TASKS
        }
        for method, found in rows.items()
    }
    alone = {task: round(bench.alone(task), 4) for task in TASKS}
    return {
        "sum": {
            "alone": round(sum(alone.values()), 4),
            **{method: round(sum(found.values()), 4) for method, found in tasks.items()},
        },
        "tasks": {"alone": alone, **tasks},
        "combinations": {
            "/".join(names): {
                method: {task: round(f1, 4) for task, f1 in rows[method][names].items()}
                for method in methods
            }
            for names in COMBINATIONS
        },
        "settings": {method: METHODS[method][1] for method in methods},
        "samples": SAMPLES,
        "texts": {task: len(bench.texts[task][0]) for task in TASKS},
    }


def ablations(bench: Bench) -> dict[str, Any]:
    """Tables 7 to 10 of the paper on the emotion tasks: the sum of the four F1 after merging all.

    The paper counts the solve from the LoRAs' own features (our first iteration) as iteration 0.
    """

    def total(settings: Mapping[str, Any], samples: int = SAMPLES) -> float:
        return round(sum(bench.row(tuple(TASKS), "iteris", settings, samples=samples).values()), 4)

    paper = METHODS["iteris-paper"][1]
    return {
        "samples": {str(n): total({}, n) for n in (12, 25, 50, 100, 200)},
        "objective": {
            "adapter": total({"align": "adapter"}),
            "full without repair": total({"repair": False}),
            "full with repair": total({}),
        },
        "ridge": {
            align: {
                str(ridge): total({"align": align, "ridge": ridge})
                for ridge in (0.0, 1e-7, 1e-5, 1e-3, 1e-1)
            }
            for align in ("full", "adapter")
        },
        "balance": {b: total({"balance": b}) for b in ("none", "tokens", "adapter", "full")},
        "balance of the paper's settings": {
            b: total({**paper, "balance": b}) for b in ("none", "adapter")
        },
        "iterations": {
            str(count - 1): total({**paper, "iterations": count}) for count in range(1, 16)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=TEXTS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--ablations", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments.data)
    methods = arguments.methods.split(",")
    torch.manual_seed(0)
    found = ablations(bench) if arguments.ablations else table(bench, methods)
    name = "language_ablations.json" if arguments.ablations else "language.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found.get("sum", found), indent=1))


if __name__ == "__main__":
    main()
