"""Five tasks merged in one encoder: the paper's multi-task table, and its tables 9 and 10.

    python benchmarks/glue_merges.py --tune     rivals' settings, into results/glue_tuning.json
    python benchmarks/glue_merges.py            results/glue.json

All five LoRAs of `glue_loras.py` are merged, and all ten pairs, from 50 and from 5 unlabelled
training texts a task, drawn three times. Rivals have the settings that are best on the valid part,
at five tasks by all of them and at two by the pairs of `PAIRS_TO_TUNE_BY`; `iteris` has its
defaults. No test text decides anything. What was computed is kept in build/glue, and not computed
again: `--minutes` ends a run, the next goes on, and results are written of what is complete.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch
from glue_loras import ADAPTERS, TASKS, quality, read_texts
from glue_texts import CACHE
from language import Bench, rounded
from outputs import read, result_file, write
from rivals import methods, tuned

from iteris_core.score.statistics import over_seeds

SAMPLES, FEW = 50, 5
DRAWS = 3
RIVALS = {
    "linear": "average",
    "ties": "ties",
    "dare": "dare-linear",
    "regmean": "regmean",
    "regmean++": "regmean++",
    "ssr": "ssr",
}
OURS = {
    name: settings
    for name, (_, settings) in methods(iterations=10, ridge=1e-7).items()
    if name in ("iteris", "iteris-paper")
}
SEES_TEXTS = ("regmean", "regmean++", "ssr", "iteris", "iteris-paper")
ALL = tuple(TASKS)
PAIRS = [*itertools.combinations(ALL, 2)]
PAIRS_TO_TUNE_BY = [("entailment", "sentiment"), ("paraphrase", "acceptability")]
WITHOUT_RIDGE = [
    ("paraphrase", "sentiment"),
    ("entailment", "acceptability"),
    ("entailment", "paraphrase"),
]
"""As the paper's table 9: MRPC with SST2, COLA with MNLI, RTE with MRPC."""
WITHOUT_BALANCE = [
    ("entailment", "acceptability"),
    ("entailment", "sentiment"),
    ("acceptability", "sentiment"),
]
"""As its table 10: COLA with MNLI, MNLI with SST2, COLA with SST2."""


class Late(Exception):
    """The minutes are over."""


class TimedBench(Bench):
    """Notes how long merges took, and ends where the time is over."""

    until = float("inf")

    def merge(self, names: Any, method: Any, settings: Any, samples: Any, seed: Any) -> Any:
        if time.monotonic() > self.until:
            raise Late
        started = time.process_time()
        found = super().merge(names, method, settings, samples, seed)
        with (CACHE / "seconds.jsonl").open("a", encoding="utf-8") as file:
            line = [method, len(names), samples, settings, time.process_time() - started]
            file.write(json.dumps(line) + "\n")
        return found


def bench_of(part: str) -> TimedBench:
    return TimedBench(
        CACHE,
        ADAPTERS,
        ("train", part),
        CACHE / f"merges_{part}.jsonl",
        tasks=TASKS,
        read=read_texts,
        metric=quality,
        methods={},
    )


def tune(bench: Bench, counts: Sequence[int]) -> None:
    """Best settings of each rival at numbers of tasks, one draw of the texts."""
    some = {5: [ALL], 2: PAIRS_TO_TUNE_BY}

    def score(method: str, k: int, settings: Mapping[str, Any]) -> float:
        rows = [bench.row(names, method, settings, samples=SAMPLES) for names in some[k]]
        return fmean(fmean(row.values()) for row in rows)

    found = read(result_file("glue_tuning.json"))
    for k, name in itertools.product(counts, RIVALS):
        kind = RIVALS[name]
        settings = tuned(kind, k, score)
        best = {"settings": settings, "mean": round(score(kind, k, settings), 4)}
        found.setdefault(str(k), {})[name] = best
        write(result_file("glue_tuning.json"), found)


def settings_of(method: str, k: int) -> tuple[str, dict[str, Any]]:
    if method in OURS:
        return "iteris", OURS[method]
    return RIVALS[method], read(result_file("glue_tuning.json"))[str(k)][method]["settings"]


def _has_settings(method: str, k: int) -> bool:
    return method in OURS or method in read(result_file("glue_tuning.json")).get(str(k), {})


def merged(
    bench: Bench, some: Sequence[tuple[str, ...]], names: Sequence[str], samples: int
) -> None:
    """Each method's mean over the merges that a task takes part in, and their sum; as many draws
    as there was time for."""
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(DRAWS):
        for method in names:
            sees = method in SEES_TEXTS
            if (seed and not sees) or not _has_settings(method, len(some[0])):
                continue
            kind, settings = settings_of(method, len(some[0]))
            count = samples if sees else SAMPLES
            rows = {c: bench.row(c, kind, settings, samples=count, seed=seed) for c in some}
            means = {t: fmean(row[t] for c, row in rows.items() if t in c) for t in ALL}
            found.setdefault(method, []).append(means)
            so_far = {method: _means(draws) for method, draws in found.items()}
            _keep(("merged", str(len(some[0])), str(samples)), so_far)


def _means(draws: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    total = over_seeds([sum(draw.values()) for draw in draws], range(len(draws)))
    return {
        "tasks": {task: fmean(draw[task] for draw in draws) for task in ALL},
        "sum": {"mean": total.mean, "se": total.to_dict()["se"]},
        "draws": len(draws),
    }


def _keep(path: Sequence[str], found: Any) -> None:
    file = result_file("glue.json")
    whole = read(file)
    inner = whole
    for name in path[:-1]:
        inner = inner.setdefault(name, {})
    inner[path[-1]] = rounded(found)
    write(file, whole)


def with_and_without(bench: Bench) -> None:
    """The paper's tables 9 and 10: Algorithm 1, and our defaults, on three pairs each."""
    ours, paper = OURS["iteris"], OURS["iteris-paper"]
    for title, pairs, changes in (
        ("ridge", WITHOUT_RIDGE, {"ridge": 0.0}),
        ("balance", WITHOUT_BALANCE, {"weighting": "none"}),
    ):
        rows = {
            name: {" / ".join(pair): bench.row(pair, "iteris", settings) for pair in pairs}
            for name, settings in (
                ("paper, without", {**paper, **changes}),
                ("paper, with", paper),
                ("defaults, without", {**ours, **changes}),
                ("defaults, with", ours),
            )
        }
        _keep((title,), rows)


def seconds() -> dict[str, float]:
    """Processor seconds of a merge of all five from fifty texts each."""
    of: dict[str, list[float]] = {}
    file = CACHE / "seconds.jsonl"
    for line in [] if not file.is_file() else file.read_text(encoding="utf-8").splitlines():
        method, k, samples, settings, taken = json.loads(line)
        if (k, samples) == (len(ALL), SAMPLES):
            paper = method == "iteris" and settings == OURS["iteris-paper"]
            of.setdefault("iteris-paper" if paper else method, []).append(taken)
    return {name: round(median(some), 2) for name, some in of.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", type=int, nargs="*", help="numbers of tasks; both without one")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = bench_of("test" if arguments.tune is None else "valid")
    bench.until = time.monotonic() + 60 * arguments.minutes
    try:
        if arguments.tune is not None:
            tune(bench, arguments.tune or (5, 2))
            return
        alone = {name: bench.alone(name) for name in ALL}
        _keep(("alone",), alone)
        _keep(("without",), {t: v["without"] for t, v in read(ADAPTERS / "training.json").items()})
        five, pairs = [ALL], PAIRS
        named = [*RIVALS, "iteris"]
        seeing = [name for name in named if name in SEES_TEXTS]
        merged(bench, five, named, SAMPLES)
        merged(bench, five, seeing, FEW)
        merged(bench, pairs, named, SAMPLES)
        merged(bench, five, [*named, "iteris-paper"], SAMPLES)
        with_and_without(bench)
        merged(bench, pairs, seeing, FEW)
    except Late:
        print("The minutes are over; the next run goes on.")
    finally:
        if arguments.tune is None:
            _keep(("seconds",), seconds())


if __name__ == "__main__":
    main()
