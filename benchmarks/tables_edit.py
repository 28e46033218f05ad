"""Tables of what is done with LoRAs beside merging (see :mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable

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
        name = {"svd": "SVD of weights, each layer", "ours": "`extract`"}.get(way, key)
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


TABLES: dict[str, Callable[[], list[str]]] = {"resize": resize, "extract": extract, "bake": bake}
