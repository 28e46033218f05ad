"""Four emotion LoRAs merged in all 11 ways: macro F1 against rivals (paper, table 3, in-domain).

    python benchmarks/language.py               the table, into results/language.json
    python benchmarks/language.py --ablations   results/language_ablations.json (tables 7 to 10)
    python benchmarks/language.py --tune        settings by the tuning texts, printed

Each merge sees 50 unlabelled training texts a task. Rivals have the settings of ``TUNED``, the best
of the grids in ``GRIDS`` on 250 other training texts a task. What was computed is kept in
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
    "dare": ("dare-linear", {}),
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

TUNED: dict[str, dict[str, Any]] = {}
GRIDS: dict[str, list[dict[str, Any]]] = {
    "task-arithmetic": [{"scale": s} for s in (0.3, 0.4, 0.5, 0.7, 1.0)],
    "ties": [{"density": d, "scale": s} for d in (0.2, 0.5) for s in (0.7, 1.0, 1.5)],
    "dare": [{"density": 0.5, "scale": s} for s in (0.3, 0.4, 0.5, 0.7, 1.0)],
    "regmean": [{"shrink": s} for s in (0.5, 0.7, 0.9, 1.0)],
    "ssr": [{"ridge": r} for r in (1e-4, 1e-3, 1e-2, 1e-1)],
}


class Bench:
    """The encoder, its LoRAs and heads, and the texts."""

    def __init__(self, data: Path) -> None:
        self.model = load_encoder()
        self.tokenizer = load_tokenizer()
        self.host = TransformersHost(self.model)
        self.loras: dict[str, Lora] = {}
        self.heads = {}
        self.calibration: dict[str, list[str]] = {}
        self.texts: dict[str, dict[str, tuple[list[str], list[int]]]] = {"test": {}, "tuning": {}}
        for task in TASKS.values():
            self.loras[task.name] = self.host.read_lora(ADAPTERS / task.name.lower())
            self.heads[task.name] = load_head(task).bfloat16()
            texts, labels = read_texts(task, "train", data)
            order = list(range(len(texts)))
            random.Random(0).shuffle(order)
            self.calibration[task.name] = [texts[i] for i in order[:400]]
            rest = order[400:650]
            self.texts["tuning"][task.name] = [texts[i] for i in rest], [labels[i] for i in rest]
            self.texts["test"][task.name] = read_texts(task, "test", data)
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

    def score(self, lora: Lora, names: Sequence[str], part: str = "test") -> dict[str, float]:
        """Macro F1 of each task with its own head on the encoder with ``lora`` in its weights."""
        plain = dict(self.model.named_modules())
        scored = dict(self.scored.named_modules())
        changes = {site.removeprefix("model."): change for site, change in lora.sites.items()}
        for name, change in changes.items():
            scored[name].weight.data.copy_(plain[name].weight.data + change.dense().float())
        found = {}
        for name in names:
            texts, labels = self.texts[part][name]
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
        part: str = "test",
    ) -> dict[str, float]:
        """F1 of each task after a merge of ``names``; from the cache if it is there."""
        kind, own = METHODS[method]
        settings = {**own, **TUNED.get(method, {}), **(settings or {})}
        key = json.dumps([list(names), kind, settings, samples, part], sort_keys=True)
        if key not in self.rows:
            self.keep(key, self.score(self.merge(names, kind, settings, samples), names, part))
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
        "settings": {m: {**METHODS[m][1], **TUNED.get(m, {})} for m in methods},
        "samples": SAMPLES,
        "texts": {task: len(bench.texts["test"][task][0]) for task in TASKS},
    }


def tune(bench: Bench, methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each method the settings with the best sum over all four and two pairs."""
    four = tuple(TASKS)
    chosen = {}
    for method in methods:
        sums = []
        for settings in GRIDS[method]:
            found = [
                bench.row(names, method, settings, part="tuning")
                for names in (four, four[:2], four[2:])
            ]
            sums.append((sum(sum(row.values()) for row in found), settings))
        chosen[method] = max(sums, key=lambda pair: pair[0])[1]
    return chosen


def ablations(bench: Bench) -> dict[str, Any]:
    """Tables 7 to 10 of the paper on the emotion tasks: sums of F1 over a combination's tasks."""
    four = tuple(TASKS)
    some = [four, *itertools.combinations(TASKS, 2)]

    def sums(settings: Mapping[str, Any], samples: int = SAMPLES, over: Any = some) -> Any:
        return {
            "/".join(names): round(
                sum(bench.row(names, "iteris", settings, samples=samples).values()), 4
            )
            for names in over
        }

    paper = METHODS["iteris-paper"][1]
    return {
        "iterations": {
            align: {
                str(count - 1): sums({**paper, "align": align, "iterations": count}, over=[four])
                for count in range(1, 16)
            }
            for align in ("adapter", "full")
        },
        "ridge": {
            align: {
                str(ridge): sums({"align": align, "ridge": ridge})
                for ridge in (0.0, 1e-7, 1e-5, 1e-3, 1e-2, 1e-1)
            }
            for align in ("adapter", "full")
        },
        "balance": {
            balance: sums({"balance": balance}) for balance in ("none", "tokens", "adapter", "full")
        },
        "samples": {str(n): sums({}, n) for n in (5, 12, 25, 50, 100, 200, 400)},
        "objective": {
            "adapter": sums({"align": "adapter"}),
            "full without repair": sums({"repair": False}),
            "full with repair": sums({}),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=TEXTS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--ablations", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments.data)
    methods = arguments.methods.split(",")
    torch.manual_seed(0)
    if arguments.tune:
        print(json.dumps(tune(bench, [m for m in methods if m in GRIDS]), indent=1))
        return
    found = ablations(bench) if arguments.ablations else table(bench, methods)
    name = "language_ablations.json" if arguments.ablations else "language.json"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found.get("sum", found), indent=1))


if __name__ == "__main__":
    main()
