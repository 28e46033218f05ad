"""Tables of what is done with LoRAs beside merging (see :mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markdown_tables import lines, load, short

_LORAS = {"sks": "three LoRAs of rank 8, mean", "merge": "a merge of the five"}
_WAYS = {"svd": "SVD of weights, each layer", "weights": "`resize`", "base": "`resize --base`"}


def resize() -> list[str]:
    """By LoRA and size, of every way the error, what it is of that of the SVD, and likeness."""
    found = load("resize.json")
    rows: list[list[str]] = []
    for key, of in found["summary"].items():
        kind, rank, way = key.split()
        figures = [short(f"{of[name]:.{n}f}") for name, n in
                   (("error", 3), ("ratio", 2), ("likeness", 3))]  # fmt: skip
        rows.append([_LORAS[kind], rank, _WAYS[way], *figures])
    for kind, label in _LORAS.items():
        whole = [key for key in found if key.startswith(kind) and key.endswith(" whole")]
        ends = [found[key]["likeness"] for key in whole if key.split()[0] not in found["chosen on"]]
        if ends:
            rows.append([label, "its own", "", "0", "", short(f"{sum(ends) / len(ends):.3f}")])
    return lines(("", "rank", "", "error", "of the SVD's", "likeness"), rows, 3)


def extract() -> list[str]:
    """By rank the error and the likeness, beside those of the base and of the fine-tune."""
    found = load("extract.json")
    rows: list[list[str]] = []
    for key, of in found.items():
        rank, _, way = key.partition(" ")
        names = {
            "svd": "SVD of weights, each layer",
            "svd with norms": "the same, with norms and biases",
            "ours": "`extract`",
        }
        name = names.get(way, key)
        rank = rank if rank.isdigit() else ""
        error = short(f"{of['error']:.3f}") if "error" in of else ""
        rows.append([rank, name, error, short(f"{of['likeness']:.3f}")])
    return lines(("rank", "", "error", "likeness"), rows, 2)


_ROUNDED = {
    "plain": "torch's cast",
    "nearest": "`bake --dtype fp8`",
    "by chance": "the same with `--seed`",
}


def bake() -> list[str]:
    """By way of rounding to fp8 the error of the denoiser's output."""
    found = load("bake.json")
    rows = [[_ROUNDED[way], short(f"{error:.3f}")] for way, error in found.items()]
    return lines(("", "error"), rows, 1)


_SHARED = "iteris:rank=8:share_ranks=true"
_FIXED = {
    "single": "each LoRA alone",
    "base": "the base",
    _SHARED: "**IterIS**, `share_ranks=true`",
    f"{_SHARED}:block_steps=120:block_pairs=0": "**IterIS**, `share_ranks=true`, `block_steps=120`",
    "iteris:rank=8": "IterIS, rank 8 in every layer, repairs too",
    "iteris:rank=8:repair=false": "IterIS, rank 8 in every layer, no repairs",
}


def fixed_rank() -> list[str]:
    """Of every method the size of its file, and on new words what it keeps and its likeness."""
    found = load("fixed_rank.json")
    rows: list[list[str]] = []
    methods = found["sizes"]["10"]["rows"]
    for label, kinds in sorted(methods.items(), key=lambda row: -_kept(row[1])):
        of, size = kinds["new words"], found["bytes"].get(label)
        name, _, settings = label.partition(":rank=8:")
        figures = [of[key]["mean"] for key in ("likeness kept", "judge kept", "likeness")]
        rows.append(
            [
                _FIXED.get(label, f"{name}, {settings.replace('=', ' ')}"),
                f"{size / 1e6:.2f}" if size else "",
                *(short(f"{figure:.3f}") for figure in figures),
            ]
        )
    return lines(("", "MB", "likeness kept", "judge kept", "likeness"), rows, 4)


def _kept(kinds: Mapping[str, Any]) -> float:
    return kinds["new words"]["likeness kept"]["mean"]


TABLES: dict[str, Callable[[], list[str]]] = {
    "resize": resize,
    "extract": extract,
    "bake": bake,
    "fixed rank": fixed_rank,
}
