"""Tables of merges under conditions of use, and of LoRAs for some layers or without words (see
:mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from statistics import fmean
from typing import Any

from markdown_tables import lead, runs, table
from new_words_tables import NAMES
from protocol.figures import Place, stat
from protocol.plan import BASE, SINGLE

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


def conditions_photos() -> list[str]:
    """Likeness and the share recognised of photographs under conditions of use, and both of IterIS
    less those of Chain of Merges, paired by set and training."""
    found, uses = _under_conditions("photos"), _uses("photos")

    def cell(sets: list[Any]) -> str:
        return " / ".join(f"{fmean(of[name] for of in sets):.3f}" for name in ("likeness", "judge"))

    rows = _means(found, uses, cell)
    for size in dict.fromkeys(size for size, _ in found):
        for name, figure in (("likeness", "likeness"), ("recognised", "judge")):
            cells = _difference(found, size, uses, itemgetter(figure))[1]
            rows.append(["", f"the difference in {name}", *cells])
    return table(("", "", *uses), rows)


def _under_conditions(world: str = "reported") -> Sets:
    """By set and training; each LoRA alone first."""
    every, found = runs(f"conditions_{world}.json"), Sets()
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


def _uses(world: str = "reported", *, further: bool = False) -> list[str]:
    """The conditions of use that all sets have, or the ``further`` ones."""
    every = runs(f"conditions_{world}.json").values()
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


TABLES: dict[str, Callable[[], list[str]]] = {
    "conditions": conditions,
    "conditions further": partial(conditions, further=True),
    "conditions lead": conditions_lead,
    "conditions photos": conditions_photos,
    "gated": partial(gated, "attention"),
    "gated all": partial(gated, "all"),
    "wordless": wordless,
}
