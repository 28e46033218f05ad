"""Tables of what else is done with LoRAs, of language models and of the toybox itself (see
:mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from markdown_tables import lead, load, runs, shown, table
from outputs import ROOT, read
from protocol.figures import Place, stat
from protocol.plan import SINGLE


def resize() -> list[str]:
    """By LoRA and size: for every way the error, its ratio to the SVD's, and the likeness; of the
    single LoRAs without those on which the weighting was chosen."""
    found = {k: of for k, of in load("resize.json").items() if k.split()[0] not in ("sks1", "sks2")}
    ways = {"svd": "SVD of weights, each layer", "weights": "`resize`", "base": "`resize --base`"}
    loras = {"sks": "three LoRAs of rank 8, mean", "merge": "a merge of the five"}

    def mean(kind: str, case: str, figure: str) -> float:
        return fmean(v[figure] for k, v in found.items() if k.startswith(kind) and k.endswith(case))

    rows: list[list[Any]] = []
    for kind, label in loras.items():
        for rank in dict.fromkeys(k.split()[1] for k in found if k.startswith(kind)):
            for way, name in ways.items() if rank != "whole" else ():
                error = mean(kind, f"{rank} {way}", "error")
                ratio = shown(error / mean(kind, f"{rank} svd", "error"), 2)
                likeness = mean(kind, f"{rank} {way}", "likeness")
                rows.append([label, rank, name, error, ratio, likeness])
    for kind, label in loras.items():
        rows.append([label, "its own", "", "0", "", mean(kind, "whole", "likeness")])
    return table(("", "rank", "", "error", "of the SVD's", "likeness"), rows, labels=3)


def tidy() -> list[str]:
    """One LoRA kept to its trigger, by world and concept; of an emoji the likeness."""
    rows: list[list[str]] = []
    for world in ("reported", "toybox", "emoji"):
        figure = "likeness" if world == "emoji" else "judge"
        for name, of in load(f"tidy_{world}.json")["runs"].items():
            found = (of[f"{figure} LoRA"], of[f"{figure} tidied"], of["class"], of["others"])
            rows.append([world, name, *(f"{one:.2f}" for one in found)])
    return table(("world", "concept", "LoRA", "tidied", "class", "others"), rows)


def versions() -> list[str]:
    """Three trainings of one concept in one LoRA, and the differences to each version alone."""
    found: dict[str, dict[str, Any]] = {}
    for (label, name), of in runs("versions_reported.json").items():
        found.setdefault(label, {})[name] = of
    names = {SINGLE: "each version alone", "average": "`average`", "iteris": "IterIS"}

    def cells(label: str, figure: str) -> list[str]:
        less = {n: of[figure] - found[SINGLE][n][figure] for n, of in found[label].items()}
        ahead = stat({Place(0, (n,)): {n: one} for n, one in less.items()})
        mean = fmean(of[figure] for of in found[label].values())
        return [f"{mean:.2f}", "" if label == SINGLE else lead(ahead)]

    rows = [[name, *cells(key, "likeness"), *cells(key, "judge")] for key, name in names.items()]
    count = len(found["iteris"])
    return table((f"{count} concepts", "likeness", "lead", "attributes", "lead"), rows)


METHODS = {
    "alone": "each LoRA alone",
    "linear": "linear",
    "task-arithmetic": "task arithmetic (0.4)",
    "ties": "TIES",
    "dare": "DARE (0.4)",
    "regmean": "RegMean (0.9)",
    "ssr": "SSR",
    "iteris": "**IterIS**, defaults",
    "iteris-shrink": "IterIS, `shrink=0.5`",
}


def emotions() -> list[str]:
    """The best sum first."""
    data, tasks = load("language.json"), ("Emoint", "EC", "TEC", "ISEAR")
    errors = data["standard_error"]
    rows = [
        [METHODS[name], *(data["tasks"][name][task] for task in tasks),
         {"mean": mean, "se": errors.get(name)}]
        for name, mean in sorted(data["sum"].items(), key=lambda one: -one[1])
    ]  # fmt: skip
    return table(("method", *tasks, "sum"), rows)


def toybox() -> list[str]:
    data = read(ROOT / "toybox" / "quality.json")
    base, judge = data["base"], data["judge"]
    parts = ("shape", "pattern", "color1", "color2", "background")
    right = " / ".join(f"{judge[f'judge_{part}']:.1%}" for part in parts).replace("%", " %")
    rows = [
        ("base, one object: shape, colour and background all right",
         _percent(base["one_shape_color_background"]), "95 %"),
        ("base, two objects: both shapes right, each in its half",
         _percent(base["two_both_shapes"]), "80 %"),
        ("base, two objects: both shapes and both colours right", _percent(base["two_all"]), ""),
        ("CLIP: text to image, top-1 of 32 (20 sets, patterns included)",
         _percent(data["clip_top1_of_32"]), "90 %"),
        ("judge on drawn pictures: shape / pattern / first / second colour / background",
         right, "97 %"),
    ]  # fmt: skip
    return table(("what", "share", "aim"), rows)


def toybox_concepts() -> list[str]:
    world = read(ROOT / "toybox" / "world.json")
    scores = read(ROOT / "toybox" / "quality.json")["concepts"]
    rows = [
        [
            f"`{entry['token']}`",
            _thing(entry),
            entry["alpha"],
            entry["layout"],
            _percent(scores[entry["token"]]["attributes"]),
            _percent(scores[entry["token"]]["all_four"]),
        ]
        for kind in ("concepts", "pivotal_concepts")
        for entry in world[kind]
    ]
    head = ("concept", "what it is", "alpha", "layout", "attributes right", "all four at once")
    return table(head, rows, labels=2)


def _thing(entry: Mapping[str, Any]) -> str:
    second, pattern = entry["color2"], entry["pattern"]
    count = "" if pattern in ("stripes", "quarters") else "a "
    singular = {"halves": "half"}.get(pattern, pattern)
    return f"{entry['color1']} {entry['class_word']} with {count}{second} {singular}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


TABLES: dict[str, Callable[[], list[str]]] = {
    "resize": resize,
    "tidy": tidy,
    "versions": versions,
    "emotions": emotions,
    "toybox": toybox,
    "toybox concepts": toybox_concepts,
}
