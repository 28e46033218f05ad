"""``docs/results.md`` and its plots, from ``results/``: where we lose first, then every world.

``python benchmarks/results_page.py`` prints the page, ``--write`` writes it and those plots that
are not of today's figures, ``--check`` fails where page or plots are not what the figures make. The
pictures of :mod:`side_by_side` are drawn by their own command.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

import tables_grid
import tables_pairs
import tables_paper
from markdown_tables import cell, lines, short
from outputs import RESULTS, ROOT
from result_plots import INTERVAL, Plot, bars, renew
from result_worlds import COLUMNS, LOW, OURS, Against, World, worlds

PAGE = ROOT / "docs" / "results.md"
IMAGES = ROOT / "docs" / "images"
DRAWN = ("image", "share", "judge", "pair", "success", "s_harm", "text")
"""Columns with a plot."""
ACROSS = {"single": "each LoRA alone", "base": "no LoRA"}
FEWEST = 3
"""Sets of which an interval is drawn."""

_HEAD = """\
# Results

This page is made from `benchmarks/results/` by `python benchmarks/results_page.py --write`. What
the columns are, and how it was measured: [benchmarks](../benchmarks/README.md). Means with standard
errors; in the plots lines at the bars are intervals of 95 %, where there are three sets at least.

Every table here was drawn on prompts of which the calibration had each, with the merge that was the
default before (`contexts=0, generic=0`). On prompts that no row had that merge breaks the picture;
today's default holds ([figures](decisions.md#prompts-that-no-row-had)).
"""


def page(found: list[World]) -> str:
    parts = [_HEAD, "## Where we lose\n", *_lost(found)]
    for world in found:
        parts += [f"## {world.title}\n", f"{world.about}\n"]
        for plot in plots_of(world):
            column = plot.name.removesuffix(".svg").rpartition("-")[2]
            parts.append(f"![{_alternative(world, column)}](images/{plot.name})\n")
        for count, methods in world.groups.items():
            parts += [f"### {world.title}: {_counted(count)}\n", _table(world, methods)]
    if (IMAGES / "results-methods.png").is_file():
        parts += [_PICTURES]
    return "\n".join([*parts, *(module.section() for module in _further())])


def _further() -> list[Any]:
    """What has a section and plots of its own, where it was measured."""
    files = {
        tables_pairs.FILE: tables_pairs,
        "reported_grid.json": tables_grid,
        "paper_figures.json": tables_paper,
    }
    return [module for file, module in files.items() if (RESULTS / file).is_file()]


_PICTURES = """\
## The same prompts by every method

![Prompts in columns; in rows what each concept was learned from, without a LoRA, with its own LoRA alone, and two LoRAs merged by six methods.](images/results-methods.png)

Two concepts of the toybox merged, every row from the same noise, the first picture of each prompt:
`python benchmarks/side_by_side.py`. Of two concepts IterIS and RegMean++ are alike to the eye, and in
one picture every method mixes them without a polish.
"""  # noqa: E501


def _lost(found: list[World]) -> Iterator[str]:
    yield (
        "On texts RegMean, SSR-Merge and the plain mean are ahead\n"
        "([language](../benchmarks/LANGUAGE.md)); SSR-Merge is quicker\n"
        "([speed](../benchmarks/README.md#speed-and-memory)). In pictures, every mean in which a\n"
        "method of others is ahead, on the sets on which both were measured:\n"
    )
    compared = [(world, entry) for world in found for entry in world.compared()]
    yield _against([pair for pair in compared if pair[1].ahead < 0])
    yield "And those in which IterIS is ahead by less than two standard errors of the difference:\n"
    yield _against([pair for pair in compared if 0 <= pair[1].ahead < 2 * pair[1].error])


def _against(compared: list[tuple[World, Against]]) -> str:
    rows = [
        (
            world.title,
            entry.count,
            COLUMNS[entry.column],
            entry.method,
            short(f"{entry.theirs:.3f}"),
            short(f"{entry.ours:.3f}"),
        )
        for world, entry in compared
    ]
    head = ("world", "concepts", "column", "best of the others", "its mean", "IterIS")
    return "\n".join(lines(head, rows, right=2)) + "\n"


def _table(world: World, methods: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(column for column in world.columns if column in DRAWN)
    order = sorted(methods, key=lambda n: -methods[n].get(first, {"mean": 0.0})["mean"])
    rows = [
        (
            f"**{name}**" if name == OURS else name,
            *(cell(methods[name].get(column)) for column in world.columns),
        )
        for name in order
    ]
    return "\n".join(lines(("method", *world.columns), rows)) + "\n"


def plots_of(world: World) -> list[Plot]:
    return [
        bars(
            f"results-{world.key}-{column}.svg",
            {
                count: {
                    name: _shown(methods[name][column])
                    for name in (*world.shown(), *ACROSS)
                    if column in methods.get(name, {})
                }
                for count, methods in world.groups.items()
            },
            COLUMNS[column],
            ACROSS,
        )
        for column in DRAWN
        if column in world.columns
    ]


def _shown(value: Mapping[str, Any]) -> dict[str, Any]:
    """What a bar shows: its height, and the ends of its interval; of two sets an interval says
    nothing, and is wider than the plot."""
    if value.get("n", FEWEST) < FEWEST:
        return {"mean": value["mean"], "interval": [value["mean"]] * 2}
    wide = INTERVAL * (value["se"] or 0.0)
    ends = value.get("interval") or [value["mean"] - wide, value["mean"] + wide]
    return {"mean": value["mean"], "interval": ends}


def plots(found: list[World]) -> list[Plot]:
    drawn = [plot for world in found for plot in plots_of(world)]
    return drawn + [plot for module in _further() for plot in module.plots()]


def _counted(count: str) -> str:
    return f"{count} concepts" if count.isdigit() else count


def _alternative(world: World, column: str) -> str:
    """What a plot shows, in a sentence."""
    known = [entry for entry in world.compared() if entry.column == column]
    said = f"{COLUMNS[column]} by the number of concepts"
    if known:
        ends = ", ".join(
            f"at {entry.count} IterIS {short(f'{entry.ours:.2f}')}, the best of the others "
            f"{short(f'{entry.theirs:.2f}')}"
            for entry in dict.fromkeys((known[0], known[-1]))
        )
        said += f", {'less' if column in LOW else 'more'} is better: {ends}"
    return f"{said}."


def stale(*, write: bool) -> list[str]:
    """What is not as the figures say."""
    found = worlds()
    old = renew(plots(found), IMAGES, write=write)
    text = page(found)
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        old.append(str(PAGE.relative_to(ROOT)))
        if write:
            PAGE.write_text(text, encoding="utf-8")
    return old


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print(page(worlds()))
        return
    old = stale(write=arguments.write)
    print("\n".join(old))
    raise SystemExit(bool(old) and arguments.check)


if __name__ == "__main__":
    main()
