"""Two concepts in one picture in ``docs/results.md``, by :mod:`two_in_one`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from markdown_tables import cell, lines, load, short, signed
from result_plots import INTERVAL, Plot, bars

from iteris_core.score.statistics import over_compositions

FILE = "two_in_one.json"
OURS, POLISHED, COMPOSITE = "iteris", "iteris, polished", "composite"
ACROSS = {COMPOSITE: "each LoRA in its half", "base": "no LoRA"}
_DRAWN = (OURS, POLISHED, "regmean++", "ssr", "regmean", *ACROSS)
_PLOT = "results-two-in-one.svg"

Pairs = Mapping[str, Sequence[float]]
"""method → the share of attributes that is right, pair by pair"""


def section() -> str:
    *rivals, last = _rivals(next(pairs for _, pairs in _sizes()))
    return f"""\
## Two concepts in one picture

From one merged LoRA, of the ten concepts on which nothing was chosen, each two neighbours of a
merge side by side, 20 pictures a pair: the share of shapes, patterns and colours that is read
rightly in the halves. *polished* is the setting `block_steps=120`, which the preset `best` has.
Each LoRA in its half is no merge: two LoRAs, each of which denoises its half of the picture.
*ahead* is by how much *polished* is ahead of the best of the others, pair by pair; they are
{", ".join(rivals)} and {last}. More, and what it costs: `python benchmarks/two_in_one.py`,
[benchmarks](../benchmarks/README.md#two-concepts-in-one-picture).

![The share of attributes that is right, by the number of concepts merged.](images/{_PLOT})

{_table()}
"""


def plots() -> list[Plot]:
    groups = {
        size: {name: _bar(pairs[name]) for name in _DRAWN if name in pairs}
        for size, pairs in _sizes()
    }
    return [bars(_PLOT, groups, "share of attributes right", ACROSS)]


def _sizes() -> Iterator[tuple[str, Pairs]]:
    for size, found in sorted(load(FILE).items(), key=lambda item: int(item[0])):
        yield size, {name: scores["pair"] for name, scores in found["runs"].items()}


def _rivals(pairs: Pairs) -> list[str]:
    return [name for name in pairs if not (name.startswith(OURS) or name in ACROSS)]


def _bar(values: Sequence[float]) -> dict[str, Any]:
    found = over_compositions(values)
    return {
        "mean": found.mean,
        "interval": [found.mean + k * found.se for k in (-INTERVAL, INTERVAL)],
    }


def _table() -> str:
    rows: list[Sequence[str]] = []
    for size, pairs in _sizes():
        ours, composite = pairs[POLISHED], fmean(pairs[COMPOSITE])
        best = max(_rivals(pairs), key=lambda name: fmean(pairs[name]))
        ahead = [one - other for one, other in zip(ours, pairs[best], strict=True)]
        shown = {name: cell(over_compositions(pairs[name]).to_dict()) for name in pairs}
        rows.append(
            (
                size,
                shown[OURS],
                shown[POLISHED],
                f"{best} {shown[best]}",
                *(shown[name] for name in ACROSS),
                signed(over_compositions(ahead).to_dict()),
                short(f"{fmean(ours) / composite:.2f}"),
            )
        )
    names = (OURS, "polished", "best of the others", *ACROSS.values())
    return "\n".join(lines(("concepts", *names, "ahead", "of each in its half"), rows))
