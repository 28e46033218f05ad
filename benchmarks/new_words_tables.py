"""Tables of merges on new words and under conditions of use, from ``results/`` (see
:mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from markdown_tables import figures, half_width, lead, load, merges, runs, share, shown, table
from protocol.figures import Place, stat
from protocol.plan import BASE, SINGLE, Unit

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


FRONT = {
    "iteris": "**IterIS**",
    "chain-of-merges:conditions=0": "Chain of Merges",
    "regmean++:conditions=0:contexts=0:generic=0": "RegMean++",
    "average": "average",
}
TOGETHER = ("sum", "task-arithmetic:scale=0.7", "task-arithmetic:scale=0.4")
"""All LoRAs loaded at once, at three strengths."""
KEPT = ("likeness kept", "judge kept")


def kept(name: str, only: Sequence[str] = ()) -> list[str]:
    """A column for each number of LoRAs, or ``only`` these: likeness and attributes kept by
    method."""
    sizes = _sizes(name, only)
    rows = [
        [label, *(_shares(of.get(name)) for of in sizes.values())]
        for name, label in FRONT.items()
        if any(name in of for of in sizes.values())
    ]
    best = (
        max(
            (of[name] for name in TOGETHER if name in of),
            key=lambda row: row["new words"]["likeness"]["mean"],
            default=None,
        )
        for of in sizes.values()
    )
    if any(row := [*map(_shares, best)]):
        rows.append(["all at once, best of three strengths", *row])
    return table(("likeness / attributes", *(f"{size} LoRAs" for size in sizes)), rows)


def how_sure(name: str, only: Sequence[str] = ()) -> list[str]:
    """Of ours the interval, the median set, the worst one, and the share of concepts that keep less
    than half."""
    sizes = _sizes(name, only)
    ours = [[of["iteris"]["new words"][name] for name in KEPT] for of in sizes.values()]
    each = {
        "95 % interval": lambda of: f"± {100 * half_width(of):.0f}",
        "median set": lambda of: f"{of['median']:.0%}",
        "worst set": lambda of: f"{of['least']:.0%}",
        "concepts that keep less than half": lambda of: f"{of['collapsed']:.0%}",
    }
    if all(two[0]["sets"] < 3 for two in ours):
        del each["median set"]
    rows = [[label, *(" / ".join(map(cell, two)) for two in ours)] for label, cell in each.items()]
    rows.append(["sets", *(str(two[0]["sets"]) for two in ours)])
    return table(("IterIS: likeness / attributes", *(f"{size} LoRAs" for size in sizes)), rows)


def _sizes(name: str, only: Sequence[str]) -> dict[str, Any]:
    found = figures(name)["sizes"]
    return {size: of["rows"] for size, of in found.items() if not only or size in only}


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


Sets = dict[tuple[int, str], dict[tuple[Any, ...], dict[str, Any]]]
"""Size and method → set → figures by use"""
Cell = Callable[[list[Any]], str]


def _by_method(file: str, kind: str) -> Sets:
    """Of runs whose keys have a kind, a method and the names of a set."""
    found: Sets = {}
    for (of_kind, label, *names), of in runs(file).items():
        if of_kind == kind:
            found.setdefault((len(names), label), {})[tuple(names)] = of
    return dict(sorted(found.items(), key=lambda one: one[0][0]))


def _means(found: Sets, heads: Sequence[str], cell: Cell, noun: str = "LoRAs") -> list[list[str]]:
    """A row for each size and method: ``cell`` of what the sets have under each head."""
    return [
        [
            f"{size} {noun}, n {len(sets)}",
            NAMES.get(label, label.removesuffix(":conditions=0").replace(":", " ")),
        ]
        + [cell([of[head] for of in sets.values() if head in of]) for head in heads]
        for (size, label), sets in found.items()
    ]


def _difference(
    found: Sets, size: int, heads: Sequence[str], figure: Callable[[Any], float]
) -> tuple[int, list[str]]:
    """How many sets IterIS and Chain of Merges share, and the difference, paired by set: with an
    interval over trainings where keys begin with one, otherwise with the sets in which it is below
    0."""
    ours, theirs = found[size, "iteris"], found[size, "chain-of-merges:conditions=0"]
    both = [key for key in ours if key in theirs]
    cells: list[str] = []
    for head in heads if both else ():
        less = {key: figure(ours[key][head]) - figure(theirs[key][head]) for key in both}
        if isinstance(both[0][0], int):
            cells.append(lead(stat({Place(key[0], key): {"": one} for key, one in less.items()})))
        else:
            below = sum(one < 0 for one in less.values())
            mean = lead({"mean": fmean(less.values()), "interval": None})
            cells.append(f"{mean} ({below} of {len(both)})")
    return len(both), cells


def conditions(*, further: bool = False) -> list[str]:
    """Attributes and backgrounds under conditions of use, means over sets and trainings: strengths
    and LoRAs beside, or the ``further`` ones."""
    found, uses = _under_conditions(), _uses(further=further)
    some = {key: {k: of for k, of in sets.items() if uses[-1] in of} for key, sets in found.items()}
    heads = [*([] if further else ["norm"]), *uses]
    rows = _means({key: sets for key, sets in some.items() if sets}, heads, _judged)
    return table(("", "", *heads), rows)


def _judged(sets: list[Any]) -> str:
    """Shares of attributes and backgrounds, or a norm."""
    if not sets or isinstance(sets[0], float):
        return f"{fmean(sets):.1f}" if sets else ""
    return " / ".join(f"{fmean(of[name] for of in sets):.2f}" for name in ("judge", "scene"))


def conditions_lead() -> list[str]:
    """Attributes of IterIS less those of Chain of Merges, paired by set and training. Where IterIS
    is not above the base with the same LoRA beside it, a lead is none."""
    found, rows, uses = _under_conditions(), list[list[str]](), _uses()
    for size in sorted(size for size, label in found if label.startswith("chain")):
        count, cells = _difference(found, size, uses, lambda of: of["judge"])
        for i, use in enumerate(uses):
            ours, base = (
                [of[use]["judge"] for of in found.get((size, label), {}).values()]
                for label in ("iteris", BASE)
            )
            if cells and base and fmean(ours) <= fmean(base):
                cells[i] = f"none above the base: {cells[i]}"
        if count > 2:
            rows.append([f"{size} LoRAs, n {count}", *cells])
    return table(("", *uses), rows)


def _under_conditions() -> Sets:
    """By set and training; each LoRA alone first."""
    every, found = runs("conditions_reported.json"), Sets()
    for (label, trained, rest, *names), of in every.items():
        if label == "iteris":
            alone = [every[SINGLE, trained, rest, name] for name in names]
            mean = {
                use: {name: fmean(one[use][name] for one in alone) for name in alone[0][use]}
                for use in alone[0]
                if use in of
            }
            found.setdefault((len(names), SINGLE), {})[(trained, *names)] = mean
        if label != SINGLE:
            found.setdefault((len(names), label), {})[(trained, *names)] = of
    order = [SINGLE, "iteris"]
    return dict(
        sorted(found.items(), key=lambda one: (one[0][0], *(one[0][1] != o for o in order)))
    )


def _uses(*, further: bool = False) -> list[str]:
    """The conditions of use that all sets have, or the ``further`` ones."""
    every = runs("conditions_reported.json").values()
    heads = dict.fromkeys(use for of in every for use in of if use not in ("norm", "seconds"))
    return [head for head in heads if further == any(head not in of for of in every)]


def gated(layers: str) -> list[str]:
    """The denoiser's error on new prompts of LoRAs cut to their attention ``layers``, or of all,
    means over sets; and IterIS less Chain of Merges, paired by set."""
    found, rows = _by_method("gated.json", layers), list[list[str]]()
    heads = [head for head in next(iter(runs("gated.json").values())) if head != "seconds"]
    for size in dict.fromkeys(size for size, _ in found):
        of_size = {key: of for key, of in found.items() if key[0] == size}
        rows += _means(of_size, heads, lambda sets: f"{fmean(sets):.3f}")
        rows.append(["", "the difference", *_difference(found, size, heads, float)[1]])
    return table(("", "", *heads), rows)


def wordless() -> list[str]:
    """Of pictures with a subject's trigger and without one: the share in the look, and of the
    subject's attributes."""
    found = _by_method("wordless_reported.json", "frame")
    heads = [use for use in next(iter(next(iter(found.values())).values())) if use != "norm"]

    def cell(sets: list[Any]) -> str:
        names = ("style", "judge", "no trigger")
        return " / ".join(f"{fmean(of[name] for of in sets):.2f}" for name in names)

    return table(("", "", *heads), _means(found, heads, cell, "subjects"))


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


def speed_lora() -> list[str]:
    """Shares kept by four-step images on new words."""
    sizes = load("speed_lora_reported.json")["sizes"]
    columns = [(size, name) for size in sorted(sizes, key=int) for name in KEPT]
    rows = [
        [label, *(share(sizes[s]["rows"][label]["new words"][name]) for s, name in columns)]
        for label in next(iter(sizes.values()))["rows"]
    ]
    return table(("four steps", *(f"{size} LoRAs: {name}" for size, name in columns)), rows)


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


UNSEEN: Mapping[str, tuple[str, Sequence[str]]] = {
    "reported": ("unseen_reported", ("2", "3", "5", "7", "10")),
    "framed": ("unseen_framed", ("5",)),
    "minilm": ("unseen_minilm", ("2", "3", "5", "8")),
    "minilm now": ("unseen_minilm_bound", ("2", "5")),
    "emoji": ("unseen_emoji", ("5", "10")),
    "emoji now": ("unseen_emoji_bound", ("10",)),
    "photos": ("unseen_photos_frozen", ("2", "3", "5", "8")),
    "photos class": ("unseen_photos_class_frozen", ("3", "5")),
    "styles": ("unseen_styles", ("2",)),
    "pairs": ("unseen_pairs", ("2",)),
}
"""Table name → runs, and the numbers of LoRAs, with one table each."""

TABLES: dict[str, Callable[[], list[str]]] = {
    "front": partial(kept, "unseen_reported"),
    "front minilm": partial(kept, "unseen_minilm"),
    "front minilm now": partial(kept, "unseen_minilm_bound", ("2", "5")),
    "front emoji": partial(kept, "unseen_emoji"),
    "front photos": partial(kept, "unseen_photos_frozen"),
    "front photos class": partial(kept, "unseen_photos_class_frozen"),
    "front reported now": partial(kept, "unseen_reported_bound"),
    "sure": partial(how_sure, "unseen_reported"),
    "sure reported now": partial(how_sure, "unseen_reported_bound"),
    "sure minilm": partial(how_sure, "unseen_minilm"),
    "sure minilm now": partial(how_sure, "unseen_minilm_bound", ("2", "5")),
    "sure emoji": partial(how_sure, "unseen_emoji"),
    "sure photos": partial(how_sure, "unseen_photos_frozen"),
    "lead": carries_the_lead,
    "conditions": conditions,
    "conditions further": partial(conditions, further=True),
    "conditions lead": conditions_lead,
    "gated": partial(gated, "attention"),
    "gated all": partial(gated, "all"),
    "wordless": wordless,
    "tidy": tidy,
    "speed LoRA": speed_lora,
    "versions": versions,
    "emotions": emotions,
    **{
        f"unseen {name} {size}" if len(sizes) > 1 else f"unseen {name}": (
            lambda runs=runs, size=size: unseen(figures(runs), size)
        )
        for name, (runs, sizes) in UNSEEN.items()
        for size in sizes
    },
}
