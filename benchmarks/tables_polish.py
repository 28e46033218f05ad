"""Tables of polish and of several concepts in one picture (see :mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from markdown_tables import lines, load, short, signed

MEASURES = ("image", "judge", "text")


def block_polish() -> list[str]:
    """Each case's methods, and by how much they are ahead of its first one."""
    rows: list[list[str]] = []
    for case, found in load("block_polish.json").items():
        bounds = (("base", found["base"]), ("each LoRA alone", found["single"]))
        rows += [[case, name, *(short(f"{of[m]:.3f}") for m in MEASURES)] for name, of in bounds]
        first = next(iter(found["methods"]))
        for name, of in found["methods"].items():
            ahead = of["less the first"]
            leads = ["", ""] if name == first else [signed(ahead[m]) for m in ("image", "judge")]
            means = [short(f"{of[m]:.3f}") for m in MEASURES]
            rows.append(
                [case, name, *means, short(f"{of['kept']:.2f}"), *leads, f"{of['seconds']:.0f}"]
            )
    width = len(MEASURES) + 6
    return lines(
        ("", "", *MEASURES, "kept", "image gained", "judge gained", "seconds"),
        [[*row, *[""] * (width - len(row))] for row in rows],
    )


_ROWS = ("pair", "both", "halves", "three")
_LEADS = ("pair", "halves", "three", "image", "judge", "text")


def two_in_one(file: str) -> list[str]:
    """By number of merged concepts what each method draws, and by how much it is ahead of ours."""
    rows: list[list[str]] = []
    found = sorted(load(file).items(), key=lambda item: int(item[0]))
    known = {measure for _, of in found for row in of["methods"].values() for measure in row}
    shown, leads = ([m for m in some if m in known] for some in ((*_ROWS, *MEASURES), _LEADS))
    for size, some in found:
        for name, of in some["methods"].items():
            ahead = of["ahead"] if name != "iteris" else {}
            means = [short(f"{of[m]:.3f}") if m in of else "" for m in shown]
            gained = [signed(ahead[m]) if m in ahead else "" for m in leads]
            seconds = f"{of['seconds']:.0f}" if "seconds" in of else ""
            rows.append([size, name, *means, *gained, seconds])
    return lines(("concepts", "", *shown, *(f"{m} gained" for m in leads), "seconds"), rows)


TABLES: dict[str, Callable[[], list[str]]] = {
    "block polish": block_polish,
    "two in one": partial(two_in_one, "two_in_one.json"),
    "two emoji in one": partial(two_in_one, "two_in_one_emoji.json"),
}
