"""Tables of prompts that no row had, from what ``unseen.py`` writes (see :mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from markdown_tables import lines, load, short

NAMES = {"single": "each LoRA alone", "sum": "sum"}
NEW_WORDS = (
    ("seen", "likeness"),
    ("seen", "judge"),
    ("new words", "likeness"),
    ("new words", "judge"),
    ("new words", "scene"),
    ("no trigger", "likeness"),
    ("spread", "share of pixels"),
)
STYLED = (
    ("styled", "judge"),
    ("styled", "style"),
    ("styled", "both"),
    ("subject", "judge"),
    ("style", "style"),
    ("no trigger", "likeness"),
)


def unseen(file: str, size: str, columns: Sequence[tuple[str, str]]) -> list[str]:
    """Means over sets and, in brackets, how far ours is ahead, with the half width of the paired
    95 % interval; bold where the interval leaves out 0."""
    data = load(file)
    found = data["sizes"][size]
    rows: list[list[str]] = []
    for label, kinds in found["rows"].items():
        ahead = found["against"].get(label, {})
        cells = [_cell(kinds, ahead, kind, name) for kind, name in columns]
        n = max(figure["n"] for of in kinds.values() for figure in of.values())
        name = f"**{label}**" if label == data["default"] else NAMES.get(label, label)
        rows.append([name, str(n), *cells])
    head = (f"{size} LoRAs", "n", *(f"{kind}: {name}" for kind, name in columns))
    return lines(head, rows, right=len(columns) + 1)


FRONT = {
    "iteris": "**IterIS**",
    "chain-of-merges": "Chain of Merges",
    "regmean++:contexts=0:generic=0": "RegMean++",
    "average": "average",
    "sum": "all loaded at once",
}


def front() -> list[str]:
    """The README's: likeness kept on new words, with the half width of its 95 % interval."""
    sizes = load("unseen_reported.json")["sizes"]
    order = sorted(sizes, key=int)

    def kept(size: str, label: str) -> Mapping[str, Any]:
        return sizes[size]["rows"][label]["new words"]["likeness kept"]

    rows = [[name, *(_share(kept(size, label)) for size in order)] for label, name in FRONT.items()]
    heads = [f"{size} LoRAs (n = {kept(size, 'iteris')['n']})" for size in order]
    return lines(("", *heads), rows, right=len(order))


def _share(figure: Mapping[str, Any]) -> str:
    return f"{figure['mean']:.0%} ± {100 * (figure['interval'][1] - figure['mean']):.0f}"


def composites() -> list[str]:
    """What weights of composites and shares of contexts were tried on pairs that no table has."""
    rows: list[list[str]] = []
    found = load("composites.json")["rows"]
    for label, of in found.items():
        name = NAMES.get(label, label.removeprefix("iteris:").replace("=", " ").replace(":", ", "))
        rows.append([name, *(short(f"{value:.3f}") for value in of.values())])
    return lines(("", *next(iter(found.values()))), rows)


def _cell(kinds: Mapping[str, Any], ahead: Mapping[str, Any], kind: str, name: str) -> str:
    figure, lead = kinds.get(kind, {}).get(name), ahead.get(kind, {}).get(name)
    if figure is None:
        return ""
    mean = short(f"{figure['mean']:.3f}")
    if lead is None:
        return mean
    if lead["interval"] is None:
        return short(f"{mean} ({lead['mean']:+.3f})")
    told = short(f"({lead['mean']:+.3f} ± {lead['interval'][1] - lead['mean']:.3f})")
    return f"{mean} **{told}**" if lead["verdict"] != "level" else f"{mean} {told}"


TABLES: dict[str, Callable[[], list[str]]] = {
    "front": front,
    "composites": composites,
    "unseen styles": partial(unseen, "unseen_styles.json", "2", STYLED),
    **{
        f"unseen toybox before {size}": partial(
            unseen, "unseen_toybox_before.json", size, NEW_WORDS
        )
        for size in ("2", "3", "5")
    },
    "unseen twenty": partial(unseen, "unseen_twenty.json", "20", NEW_WORDS),
    **{
        f"unseen few {size}": partial(unseen, "unseen_reported_few.json", size, NEW_WORDS)
        for size in ("3", "5")
    },
    **{
        f"unseen reported {size}": partial(unseen, "unseen_reported.json", size, NEW_WORDS)
        for size in ("2", "3", "5", "7", "10")
    },
}
