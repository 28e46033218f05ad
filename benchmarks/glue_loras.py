"""Five LoRAs and heads for the tasks of `glue_texts.py`, on MiniLM as for the emotions.

    python benchmarks/glue_texts.py     the texts, into build/glue
    python benchmarks/glue_loras.py           trains what is missing in benchmarks/data/glue

One folder of peft a task; benchmarks/data/glue/training.json has each one's quality on the test
part, alone and with its LoRA taken off, the seconds that it took on one core, and by which texts it
was trained. Quality is accuracy, and of acceptability, as in GLUE, Matthews' correlation.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from emotion import Emotion, fit, load_encoder, load_head, load_tokenizer, predict
from glue_texts import CACHE, TOPICS, digests, read
from outputs import add

ADAPTERS = Path(__file__).resolve().parent / "data" / "glue"
_YES = ("no", "yes")
TASKS = {
    task.name: task
    for task in (
        Emotion("entailment", "entailment", _YES, 4),
        Emotion("paraphrase", "paraphrase", _YES, 4),
        Emotion("acceptability", "acceptability", _YES, 4),
        Emotion("topic", "topic", tuple(sorted(TOPICS.values())), 3),
        Emotion("sentiment", "sentiment", ("negative", "positive"), 3),
    )
}


def read_texts(task: Emotion, part: str, data: Path = CACHE) -> tuple[list[str], list[int]]:
    rows = read(task.file, part, data)
    return [row["text"] for row in rows], [task.labels.index(row["label"]) for row in rows]


def quality(task: Emotion, truth: Sequence[int], found: Sequence[int]) -> float:
    """Accuracy, or Matthews' correlation, which is 0 where all answers are the same."""
    pairs = list(zip(truth, found, strict=True))
    if task.name != "acceptability":
        return sum(t == f for t, f in pairs) / len(pairs)
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (0, 1), (1, 0)))
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / below**0.5 if below else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tasks", nargs="*", default=[*TASKS])
    parser.add_argument("--data", type=Path, default=CACHE)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer()
    for task in (TASKS[name] for name in arguments.tasks):
        if (ADAPTERS / task.name).exists():
            continue
        started = time.process_time()
        texts, labels = read_texts(task, "train", arguments.data)
        inner = fit(task, texts, labels, ADAPTERS, rank=8, rate=arguments.rate)
        seconds = time.process_time() - started
        texts, labels = read_texts(task, "test", arguments.data)
        parts = {part: read(task.file, part, arguments.data) for part in ("train", "valid", "test")}
        head = load_head(task, ADAPTERS)
        found = {
            "alone": quality(task, labels, predict(inner, inner.classifier, tokenizer, texts)),
            "without": quality(task, labels, predict(load_encoder(), head, tokenizer, texts)),
            "seconds": round(seconds),
            "texts": digests({task.name: parts})[task.name],
        }
        add(ADAPTERS / "training.json", task.name, found)
        print(task.name, json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
