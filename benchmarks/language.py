"""Four emotion LoRAs merged in all 11 ways: macro F1 against rivals (paper, table 3, in-domain).

    python benchmarks/language.py               the table, into results/language.json
    python benchmarks/language.py --ablations   results/language_ablations.json (tables 7 to 10)

Each merge sees 50 unlabelled training texts a task (`--samples`), drawn anew `--draws` times. Every
method has the settings that its authors publish (`iteris`: our defaults). What was computed is kept
in build/language.jsonl, line by line, and not computed again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from emotion import (
    ADAPTERS,
    TASKS,
    TEXTS,
    Emotion,
    batches,
    load_encoder,
    load_head,
    load_tokenizer,
    macro_f1,
    predict,
    read_texts,
)
from outputs import read, result_file, write
from rivals import Methods, methods

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.hosts.transformers import TransformersHost
from iteris_core.score.statistics import Stat, over_seeds

CACHE = Path("build/language.jsonl")
SAMPLES = 50
DRAWN = ("regmean", "ssr", "iteris", "iteris-shrink", "iteris-paper")
"""Methods that see texts: their figures depend on which are drawn."""
COMBINATIONS = [c for n in (2, 3, 4) for c in itertools.combinations(TASKS, n)]
SHRINK = {"shrink": 0.5, "ridge": 1e-5}
METHODS = {**methods(iterations=10, ridge=1e-7), "iteris-shrink": ("iteris", SHRINK)}
"""`shrink` is the only setting that was chosen, on other texts than those reported here
(`language_tuning.py`)."""


def f1(task: Emotion, truth: Sequence[int], found: Sequence[int]) -> float:
    return macro_f1(truth, found, len(task.labels))


class Bench:
    """The encoder, its LoRAs and heads, and the texts; ``parts``: those that merges see, and those
    that they are scored on. What was computed is kept in ``cache``. A row may name a method by its
    name in ``methods``."""

    def __init__(
        self,
        data: Path,
        adapters: Path = ADAPTERS,
        parts: tuple[str, str] = ("train", "test"),
        cache: Path = CACHE,
        *,
        tasks: Mapping[str, Emotion] = TASKS,
        read: Callable[[Emotion, str, Path], tuple[list[str], list[int]]] = read_texts,
        metric: Callable[[Emotion, Sequence[int], Sequence[int]], float] = f1,
        methods: Methods = METHODS,
    ) -> None:
        self.model = load_encoder()
        self.tokenizer = load_tokenizer()
        self.host = TransformersHost(self.model)
        self.loras: dict[str, Lora] = {}
        self.heads = {}
        self.pool: dict[str, list[str]] = {}
        self.texts: dict[str, tuple[list[str], list[int]]] = {}
        self.tasks, self.metric, self.methods = tasks, metric, methods
        for task in tasks.values():
            folder = adapters / task.name.lower()
            if not folder.exists():
                continue
            self.loras[task.name] = self.host.read_lora(folder)
            self.heads[task.name] = load_head(task, adapters).bfloat16()
            self.pool[task.name] = read(task, parts[0], data)[0]
            self.texts[task.name] = read(task, parts[1], data)
        self.scored = copy.deepcopy(self.model).bfloat16()  # a quarter of the time
        self.cache = cache
        self.rows = _read_cache(cache)

    def merge(
        self,
        names: Sequence[str],
        method: str,
        settings: Mapping[str, Any],
        samples: int,
        seed: int,
    ) -> Lora:
        concepts = []
        for name in names:
            order = list(range(len(self.pool[name])))
            random.Random(seed).shuffle(order)
            texts = [self.pool[name][i] for i in order[:samples]]
            inputs = [batch for _, batch in batches(self.tokenizer, texts, 16)]
            concepts.append(Concept(self.loras[name], trigger=name, inputs=inputs))
        found = merge_loras(
            self.host,
            concepts,
            method,
            settings=dict(settings),
            calibration=Calibration(samples=samples, seed=seed),
        )
        return found.lora

    def score(self, lora: Lora, names: Sequence[str]) -> dict[str, float]:
        """How good each task is with its own head on the encoder with ``lora`` in its weights."""
        plain = dict(self.model.named_modules())
        scored = dict(self.scored.named_modules())
        changes = {site.removeprefix("model."): change for site, change in lora.sites.items()}
        for name, change in changes.items():
            scored[name].weight.data.copy_(plain[name].weight.data + change.dense().float())
        found = {}
        for name in names:
            texts, labels = self.texts[name]
            guessed = predict(self.scored, self.heads[name], self.tokenizer, texts)
            found[name] = self.metric(self.tasks[name], labels, guessed)
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
        seed: int = 0,
    ) -> dict[str, float]:
        """How good each task is after a merge of ``names``; from the cache if it is there."""
        kind, own = self.methods.get(method, (method, {}))
        settings = {**own, **(settings or {})}
        key = json.dumps([list(names), kind, settings, samples, seed], sort_keys=True)
        if key not in self.rows:
            self.keep(key, self.score(self.merge(names, kind, settings, samples, seed), names))
        return self.rows[key]

    def alone(self, name: str) -> float:
        key = json.dumps(["alone", name])
        if key not in self.rows:
            self.keep(key, self.score(self.loras[name], [name]))
        return self.rows[key][name]

    def keep(self, key: str, found: dict[str, float]) -> None:
        self.rows[key] = found
        print(round(sum(found.values()), 4), key, flush=True)
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "f1": found}) + "\n")


def _read_cache(cache: Path) -> dict[str, dict[str, float]]:
    if not cache.is_file():
        return {}
    lines = cache.read_text(encoding="utf-8").splitlines()
    return {row["key"]: row["f1"] for row in map(json.loads, lines)}


def table(bench: Bench, methods: Sequence[str], draws: int, samples: int) -> dict[str, Any]:
    """Means over the combinations that a task takes part in, and their sum, as in table 3."""
    sums: dict[str, Stat] = {}
    tasks: dict[str, dict[str, float]] = {"alone": {task: bench.alone(task) for task in TASKS}}
    combinations: dict[str, dict[str, dict[str, float]]] = {"/".join(c): {} for c in COMBINATIONS}
    for method in methods:
        seeds = range(draws if method in DRAWN else 1)
        runs = [
            {c: bench.row(c, method, samples=samples, seed=seed) for c in COMBINATIONS}
            for seed in seeds
        ]
        means = [
            {t: fmean(f1[t] for c, f1 in run.items() if t in c) for t in TASKS} for run in runs
        ]
        sums[method] = over_seeds([sum(mean.values()) for mean in means], seeds)
        tasks[method] = {task: fmean(mean[task] for mean in means) for task in TASKS}
        for c in COMBINATIONS:
            combinations["/".join(c)][method] = {t: fmean(run[c][t] for run in runs) for t in c}
    return {
        "sum": {"alone": sum(tasks["alone"].values()), **{m: s.mean for m, s in sums.items()}},
        "standard_error": {m: s.se for m, s in sums.items() if not math.isnan(s.se)},
        "tasks": tasks,
        "combinations": combinations,
        "settings": {method: METHODS[method][1] for method in methods},
        "samples": samples,
        "draws": {m: draws if m in DRAWN else 1 for m in methods},
        "texts": {task: len(bench.texts[task][0]) for task in TASKS},
    }


def joined(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """``old`` with everything that is in ``new``, at every depth."""
    nested = {n: joined(old[n], v) for n, v in new.items() if isinstance(v, dict) and n in old}
    return {**old, **new, **nested}


def rounded(found: Any) -> Any:
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    return round(found, 4) if isinstance(found, float) and found > 1e-3 else found


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
            "adapter": total({"objective": "adapter"}),
            "output without repair": total({"repair": False}),
            "output with repair": total({}),
        },
        "ridge": {
            objective: {
                str(ridge): total({"objective": objective, "ridge": ridge})
                for ridge in (0.0, 1e-7, 1e-5, 1e-3, 1e-1)
            }
            for objective in ("output", "adapter")
        },
        "weighting": {b: total({"weighting": b}) for b in ("none", "tokens", "adapter", "full")},
        "weighting of the paper's settings": {
            b: total({**paper, "weighting": b}) for b in ("none", "adapter")
        },
        "iterations": {
            str(count - 1): total({**paper, "iterations": count})
            for count in (1, 2, 3, 4, 6, 10, 15)
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=TEXTS)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--draws", type=int, default=1, help="of the texts, for standard errors")
    parser.add_argument("--ablations", action="store_true")
    arguments = parser.parse_args()
    bench = Bench(arguments.data)
    name = "language_ablations.json" if arguments.ablations else "language.json"
    if arguments.samples != SAMPLES:
        name = f"language_{arguments.samples}.json"
    if arguments.ablations:
        found = rounded(ablations(bench))
    else:
        names = arguments.methods.split(",")
        found = rounded(table(bench, names, arguments.draws, arguments.samples))
        found = joined(read(result_file(name)), found)  # methods that were not asked for stay
    write(result_file(name), found)
    print(json.dumps(found.get("sum", found), indent=1))


if __name__ == "__main__":
    main()
