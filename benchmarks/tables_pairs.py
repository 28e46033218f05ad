"""Two concepts in one picture, and three, in ``docs/results.md``, by :mod:`two_in_one`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from markdown_tables import cell, lines, load, short, signed
from result_plots import INTERVAL, Plot, bars

from iteris_core.score.statistics import over_compositions

FILE = "two_in_one.json"
OURS, POLISHED, COMPOSITE = "iteris", "iteris, polished", "composite"
ACROSS = {COMPOSITE: "each LoRA in its place", "base": "no LoRA"}
_DRAWN = (OURS, POLISHED, "regmean++", "ssr", "regmean", *ACROSS)
_PLOTS = {
    "pair": "results-two-in-one.svg",
    "halves": "results-two-by-halves.svg",
    "three": "results-three-in-one.svg",
}
"""By measure: with one prompt that names both, with a prompt for each half, for each of three."""

Pairs = Mapping[str, Sequence[float]]
"""method → the share of attributes that is right, pair by pair"""


def section() -> str:
    *rivals, last = _rivals(next(pairs for _, pairs in _sizes("pair")))
    return f"""\
## Two concepts in one picture

From one merged LoRA, of the ten concepts on which nothing was chosen, each two neighbours of a
merge side by side, 20 pictures a pair: the share of shapes, patterns and colours that is read
rightly in the halves. *polished* is the setting `block_steps=120`, which the preset `best` has.
Each LoRA in its place is no merge: two LoRAs, each of which denoises its half of the picture.
*ahead* is by how much a merge is ahead of the best of the others, pair by pair; they are
{", ".join(rivals)} and {last}. More, and what it costs: `python benchmarks/two_in_one.py`,
[benchmarks](../benchmarks/README.md#two-concepts-in-one-picture).

With **one prompt that names both**:

![The share of attributes that is right, by concepts merged.](images/{_PLOTS["pair"]})

{_table("pair")}

With **a prompt for each half**, of two of its own concept, and the same merged LoRA in both, as
regional prompts and masks do (the graph `two_in_one_picture`); a picture takes twice the time. So
measured are of the others RegMean++, RegMean and SSR-Merge, and with two all but one:

![The share of attributes that is right by halves, by concepts merged.](images/{_PLOTS["halves"]})

{_table("halves")}

**Three in a row**, a picture half as wide again, with a prompt for each third: the merged LoRA
denoises windows as wide as its own pictures, each of two neighbours, and what two windows say of
one thing is averaged (MultiDiffusion). The base draws no more than two things where one prompt
names three. So measured are of the others RegMean++, RegMean and SSR-Merge:

![The share of attributes that is right in rows of three.](images/{_PLOTS["three"]})

{_table("three")}
"""


def plots() -> list[Plot]:
    return [_plot(measure) for measure in _PLOTS if any(_sizes(measure))]


def _plot(measure: str) -> Plot:
    groups = {
        size: {name: _bar(pairs[name]) for name in _DRAWN if name in pairs}
        for size, pairs in _sizes(measure)
    }
    return bars(_PLOTS[measure], groups, "share of attributes right", ACROSS)


def _sizes(measure: str) -> Iterator[tuple[str, Pairs]]:
    """Of as many methods as have the measure, where ours and its bounds do."""
    for size, found in sorted(load(FILE).items(), key=lambda item: int(item[0])):
        runs = found["runs"].items()
        pairs = {name: scores[measure] for name, scores in runs if measure in scores}
        if {OURS, POLISHED, *ACROSS} <= pairs.keys():
            yield size, pairs


def _rivals(pairs: Pairs) -> list[str]:
    return [name for name in pairs if not (name.startswith(OURS) or name in ACROSS)]


def _bar(values: Sequence[float]) -> dict[str, Any]:
    found = over_compositions(values)
    return {
        "mean": found.mean,
        "interval": [found.mean + k * found.se for k in (-INTERVAL, INTERVAL)],
    }


def _table(measure: str) -> str:
    rows: list[Sequence[str]] = []
    for size, pairs in _sizes(measure):
        best = max(_rivals(pairs), key=lambda name: fmean(pairs[name]))
        shown = {name: cell(over_compositions(pairs[name]).to_dict()) for name in pairs}
        rows.append(
            (
                size,
                shown[OURS],
                shown[POLISHED],
                f"{best} {shown[best]}",
                *(shown[name] for name in ACROSS),
                *(_ahead(pairs[name], pairs[best]) for name in (OURS, POLISHED)),
                *(
                    short(f"{fmean(pairs[name]) / fmean(pairs[COMPOSITE]):.2f}")
                    for name in (OURS, POLISHED)
                ),
            )
        )
    names = (OURS, "polished", "best of the others", *ACROSS.values())
    told = ("ahead", "of each in its place")
    head = ("concepts", *names, *(f"{name}{more}" for name in told for more in ("", ", polished")))
    return "\n".join(lines(head, rows))


def _ahead(ours: Sequence[float], theirs: Sequence[float]) -> str:
    differences = [one - other for one, other in zip(ours, theirs, strict=True)]
    return signed(over_compositions(differences).to_dict())
