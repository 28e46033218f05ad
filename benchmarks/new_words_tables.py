"""Tables of merges on new words, from ``results/`` (see :mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from markdown_tables import figures, half_width, lead, load, merges, share, shown, table
from outputs import RESULTS
from protocol.figures import results
from protocol.plan import BASE, SINGLE, Unit
from protocol.runs import stored

NAMES = {SINGLE: "each LoRA alone", BASE: "no LoRA"}
COLUMNS: Sequence[tuple[str, str]] = (
    ("seen", "likeness"),
    ("seen", "judge"),
    *((kind, name) for kind in ("pair", "halves") for name in ("right", "complete")),
    *(("styled", name) for name in ("judge", "style", "both")),
    ("subject", "judge"),
    ("style", "style"),
    ("new words", "likeness"),
    *(("new words", name) for name in ("likeness kept", "dino", "text")),
    ("new words", "judge"),
    ("new words", "scene"),
    ("no trigger", "likeness"),
    ("spread", "share of pixels"),
    ("quality", "distance"),
    ("quality", "base"),
)
"""Kind of prompt and figure of each column; a table has those that were measured."""

UNJUDGED = {("new words", name) for name in ("likeness kept", "dino", "text")}
"""Columns of worlds in which nothing judges attributes."""


def unseen(data: Mapping[str, Any], size: str) -> list[str]:
    """Means over sets and, in brackets, our lead with half the width of the paired 95 % interval;
    bold if the verdict is *first* or *behind*."""
    found = data["sizes"][size]
    known = {(kind, name) for of in found["rows"].values() for kind in of for name in of[kind]}
    if ("new words", "judge") in known:
        known -= UNJUDGED
    columns = [column for column in COLUMNS if column in known]
    rows: list[list[str]] = []
    for label, kinds in found["rows"].items():
        ahead = found["against"].get(label, {})
        sets = max(figure["sets"] for of in kinds.values() for figure in of.values())
        name = f"**{label}**" if label == data["default"] else NAMES.get(label, label)
        rows.append([name, str(sets), *(_with_lead(kinds, ahead, *column) for column in columns)])
    head = (f"{size} LoRAs", "sets", *(f"{kind}: {name}" for kind, name in columns))
    return table(head, rows)


def _with_lead(kinds: Mapping[str, Any], ahead: Mapping[str, Any], kind: str, name: str) -> str:
    figure, ours = kinds.get(kind, {}).get(name), ahead.get(kind, {}).get(name)
    if figure is None or ours is None:
        return "" if figure is None else shown(figure["mean"])
    bold = "**" if ours["verdict"] in ("first", "behind") else ""
    return f"{shown(figure['mean'])} {bold}({lead(ours)}){bold}"


FURTHER = "regmean++:conditions=0"
"""What was run after a table."""
LABELS = {
    "iteris": "**IterIS**",
    "chain-of-merges:conditions=0": "Chain of Merges",
    "regmean++:conditions=0:contexts=0:generic=0": "RegMean++",
    FURTHER: "RegMean++ with all our prompts, run later",
    "average": "average",
}
FRONT = {name: label for name, label in LABELS.items() if name != FURTHER}
TOGETHER = ("sum", "task-arithmetic:scale=0.7", "task-arithmetic:scale=0.4")
"""All LoRAs loaded at once, at three strengths."""
KEPT = ("likeness kept", "judge kept")


def kept(
    name: str, only: Sequence[str] = (), judged: str = "attributes", further: str = ""
) -> list[str]:
    """A column for each number of LoRAs, or ``only`` these: likeness kept by method, those of
    ``further`` runs too, and what is ``judged``."""
    sizes = _sizes(figures(name, further), only)
    rows = [
        [label, *(_shares(of.get(name)) for of in sizes.values())]
        for name, label in LABELS.items()
        if any(name in of for of in sizes.values())
    ]
    if any(best := [_best_together(of) for of in sizes.values()]):
        rows.append(["all at once, the best strength for each figure", *best])
    return table((f"likeness / {judged}", *(f"{size} LoRAs" for size in sizes)), rows)


def fast_reported() -> list[str]:
    """What the preset ``fast`` keeps, and the default on the same sets."""
    default, fast = merges("unseen_reported_steps"), merges("unseen_reported_fast")
    sets = {(unit.names, unit.replicate) for unit in map(Unit.of, fast)}
    same = {
        key: of
        for key, of in default.items()
        if (unit := Unit.of(key)).label == "iteris" and (unit.names, unit.replicate) in sets
    }
    alone = stored(RESULTS / "unseen_reported_alone.jsonl")
    sizes = results(alone, {**same, **fast})["sizes"]
    labels = {"iteris": "default", Unit.of(next(iter(fast))).label: "`fast`"}
    rows = [
        [name, *(_shares(of["rows"][label]) for of in sizes.values())]
        for label, name in labels.items()
    ]
    return table(("likeness / attributes", *(f"{size} LoRAs" for size in sizes)), rows)


def how_sure(name: str, only: Sequence[str] = (), judged: str = "attributes") -> list[str]:
    """Of ours the interval, the worst set, and the share of concepts that keep less
    than half."""
    sizes = _sizes(figures(name), only)
    ours = [[of["iteris"]["new words"][name] for name in KEPT] for of in sizes.values()]
    each = {
        "95 % interval": lambda of: f"± {100 * half_width(of):.0f}",
        "worst set": lambda of: f"{of['least']:.0%}",
        "concepts that keep less than half": lambda of: f"{of['collapsed']:.0%}",
    }
    rows = [[label, *(" / ".join(map(cell, two)) for two in ours)] for label, cell in each.items()]
    rows.append(["sets", *(str(two[0]["sets"]) for two in ours)])
    return table((f"IterIS: likeness / {judged}", *(f"{size} LoRAs" for size in sizes)), rows)


def _sizes(found: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    return {size: of["rows"] for size, of in found["sizes"].items() if not only or size in only}


def _best_together(rows: Mapping[str, Any]) -> str:
    known = [rows[name]["new words"] for name in TOGETHER if name in rows]
    best = (max(of[name]["mean"] for of in known) for name in KEPT)
    return " / ".join(f"{share:.0%}" for share in best) if known else ""


def _shares(row: Mapping[str, Any] | None) -> str:
    return " / ".join(f"{row['new words'][name]['mean']:.0%}" for name in KEPT) if row else ""


LEAD = {
    "iteris": "**IterIS**",
    "iteris:repair=false": "IterIS without repair",
    "iteris:bound=0:saliency=0:weighting=none:conditions=0": "Chain of Merges with repair",
    "chain-of-merges:conditions=0": "Chain of Merges",
    "iteris:rank=8:share_ranks=true": "IterIS in the size of one LoRA",
    "chain-of-merges:rank=8:conditions=0": "Chain of Merges in that size",
    "random": "random directions of the sum's norm",
}


def carries_the_lead() -> list[str]:
    """Size of the file, and shares of likeness and attributes kept on new words."""
    name = "unseen_reported_lead"
    sizes, units = figures(name)["sizes"], [(Unit.of(k), of) for k, of in merges(name).items()]
    rows: list[list[str]] = []
    for method, label in LEAD.items():
        cells: list[str] = []
        for size, of in sizes.items():
            own = [run["bytes"] for unit, run in units
                   if (unit.label, len(unit.names)) == (method, int(size))]  # fmt: skip
            cells += [f"{fmean(own) / 1e6:.2f}", _shares(of["rows"].get(method))]
        rows.append([label, *cells])
    heads = (cell for size in sizes for cell in (f"{size} LoRAs: MB", "likeness / attributes"))
    return table(("kept", *heads), rows)


def speed_lora() -> list[str]:
    """Shares kept by four-step images on new words."""
    sizes = load("speed_lora_reported.json")["sizes"]
    columns = [(size, name) for size in sorted(sizes, key=int) for name in KEPT]
    rows = [
        [label, *(share(sizes[s]["rows"][label]["new words"][name]) for s, name in columns)]
        for label in next(iter(sizes.values()))["rows"]
    ]
    return table(("four steps", *(f"{size} LoRAs: {name}" for size, name in columns)), rows)


UNSEEN: Mapping[str, tuple[str, Sequence[str]]] = {
    "reported": ("unseen_reported", ("2", "3", "5", "7", "10")),
    "reported now": ("unseen_reported_steps", ("2", "5", "10")),
    "framed": ("unseen_framed", ("5",)),
    "minilm": ("unseen_minilm", ("2", "3", "5", "8")),
    "minilm now": ("unseen_minilm_steps", ("2", "3", "5", "8")),
    "minilm closed": ("unseen_minilm_bound", ("2", "5")),
    "emoji": ("unseen_emoji", ("5", "10")),
    "emoji now": ("unseen_emoji_bound", ("10",)),
    "photos": ("unseen_photos_frozen", ("2", "3", "5", "8")),
    "photos class": ("unseen_photos_class_frozen", ("3", "5")),
    "photos small": ("unseen_photos_small", ("3", "5", "8")),
    "styles": ("unseen_styles", ("2",)),
    "pairs": ("unseen_pairs", ("2",)),
}
"""Table name → runs, and the numbers of LoRAs, with one table each."""

TABLES: dict[str, Callable[[], list[str]]] = {
    "front": partial(kept, "unseen_reported"),
    "front minilm": partial(kept, "unseen_minilm"),
    "front minilm now": partial(kept, "unseen_minilm_steps"),
    "front minilm closed": partial(kept, "unseen_minilm_bound", ("2", "5")),
    "front emoji": partial(kept, "unseen_emoji"),
    "front photos": partial(
        kept, "unseen_photos_frozen", judged="recognised", further="unseen_photos_rows"
    ),
    "front photos class": partial(
        kept,
        "unseen_photos_class_frozen",
        judged="recognised",
        further="unseen_photos_class_rows",
    ),
    "front reported now": partial(kept, "unseen_reported_steps"),
    "front reported closed": partial(kept, "unseen_reported_bound"),
    "sure": partial(how_sure, "unseen_reported"),
    "sure reported now": partial(how_sure, "unseen_reported_steps"),
    "sure reported closed": partial(how_sure, "unseen_reported_bound"),
    "sure minilm": partial(how_sure, "unseen_minilm"),
    "sure minilm now": partial(how_sure, "unseen_minilm_steps"),
    "sure minilm closed": partial(how_sure, "unseen_minilm_bound", ("2", "5")),
    "sure emoji": partial(how_sure, "unseen_emoji"),
    "sure photos": partial(how_sure, "unseen_photos_frozen", judged="recognised"),
    "lead": carries_the_lead,
    "fast reported": fast_reported,
    "speed LoRA": speed_lora,
    **{
        f"unseen {name} {size}" if len(sizes) > 1 else f"unseen {name}": (
            lambda runs=runs, size=size: unseen(figures(runs), size)
        )
        for name, (runs, sizes) in UNSEEN.items()
        for size in sizes
    },
}
