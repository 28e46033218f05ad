"""Tables of prompts that no row had, from what ``unseen.py`` writes (see :mod:`tables`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from markdown_tables import lines, load, load_rows, short

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
        if re.split("[@:]", label)[0] in data.get("stale", ()):
            name += " (older code)"
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


_NEW_WORDS = {"alone": "each alone", "iteris": "**IterIS**", "regmean++": "RegMean++"}


def minilm() -> list[str]:
    """Attributes and backgrounds that are right, of all LoRAs of a merge."""
    kinds = ("seen", "contexts", "new")
    rows: list[list[str]] = []
    for entry in load_rows("minilm_new_words.jsonl"):
        method, _, settings = entry["label"].partition(" ")
        name = " ".join([_NEW_WORDS.get(method, method), settings]).strip()
        cells = [short(f"{entry[kind][0]:.2f} / {entry[kind][1]:.2f}") for kind in kinds]
        rows.append([str(len(entry["names"])), name, *cells])
    order = sorted(rows, key=lambda row: int(row[0]))
    return lines(("LoRAs", "", "seen", "new contexts", "new words"), order)


def contexts() -> list[str]:
    """Seen / new words: the denoiser's error, attributes and backgrounds that are right; the mean
    of the sets of up to five LoRAs, and the set of six."""
    rows: list[list[str]] = []
    for name, sets in load("contexts.json").items():
        few = [of for numbers, of in sets.items() if len(numbers.split(",")) < 6]
        six = [of for numbers, of in sets.items() if len(numbers.split(",")) == 6]
        means = [
            [fmean(of[kind][i] for of in some) for kind in ("seen", "new")]
            for some in (few, six)
            for i in range(3)
        ]
        rows.append([short(name), *(short(f"{seen:.3f} / {new:.3f}") for seen, new in means)])
    columns = ("error", "attributes", "backgrounds")
    heads = [f"{of}: {column}" for of in ("four and five", "six") for column in columns]
    return lines(("contexts", *heads), rows, right=6)


def packed_rows() -> list[str]:
    """Merges whose rows wait in one way or another, on new words."""
    sets = load("packed_rows.json")
    order = sorted(sets, key=len)
    rows = [
        [name, *(" / ".join(short(f"{value:.3f}") for value in sets[key][name]) for key in order)]
        for name in sets[order[0]]
    ]
    counts = {2: "two LoRAs", 5: "five LoRAs"}
    return lines(("rows wait", *(counts[len(key.split(","))] for key in order)), rows, right=2)


def _cell(kinds: Mapping[str, Any], ahead: Mapping[str, Any], kind: str, name: str) -> str:
    figure, lead = kinds.get(kind, {}).get(name), ahead.get(kind, {}).get(name)
    if figure is None:
        return ""
    mean = short(f"{figure['mean']:.3f}")
    if lead is None:
        return mean
    if lead["interval"] is None:
        return short(f"{mean} ({lead['mean']:+.3f})")
    lead_text = short(f"({lead['mean']:+.3f} ± {lead['interval'][1] - lead['mean']:.3f})")
    return f"{mean} **{lead_text}**" if lead["verdict"] != "level" else f"{mean} {lead_text}"


def speed_lora() -> list[str]:
    """What four steps keep on new words, with the half width of the 95 % interval over sets; of two
    sets it says nothing, and is left out."""
    sizes = load("speed_lora.json")["sizes"]
    order, figures = sorted(sizes, key=int), ("likeness kept", "judge kept")
    rows: list[list[str]] = []
    for label in next(iter(sizes.values()))["rows"]:
        cells = [
            _share(found) if found["n"] > 2 else f"{found['mean']:.0%}"
            for size in order
            for name in figures
            for found in [sizes[size]["rows"][label]["new words"][name]]
        ]
        rows.append([label, *cells])
    heads = [f"{size} LoRAs: {name}" for size in order for name in figures]
    return lines(("four steps", *heads), rows, right=len(heads))


TABLES: dict[str, Callable[[], list[str]]] = {
    "front": front,
    "speed LoRA": speed_lora,
    "composites": composites,
    "minilm": minilm,
    "contexts": contexts,
    "packed rows": packed_rows,
    "unseen styles": partial(unseen, "unseen_styles.json", "2", STYLED),
    **{
        f"unseen toybox before {size}": partial(
            unseen, "unseen_toybox_before.json", size, NEW_WORDS
        )
        for size in ("2", "3", "5")
    },
    "unseen many": partial(unseen, "unseen_reported_many.json", "5", NEW_WORDS),
    **{
        f"unseen emoji {size}": partial(unseen, "unseen_emoji.json", size, NEW_WORDS)
        for size in ("2", "3", "5", "9")
    },
    "unseen fast": partial(unseen, "unseen_reported_fast.json", "5", NEW_WORDS),
    "unseen twenty": partial(unseen, "unseen_twenty.json", "20", NEW_WORDS),
    **{
        f"unseen few {size}": partial(unseen, "unseen_reported_few.json", size, NEW_WORDS)
        for size in ("2", "3", "5", "7")
    },
    **{
        f"unseen reported {size}": partial(unseen, "unseen_reported.json", size, NEW_WORDS)
        for size in ("2", "3", "5", "7", "10")
    },
}
