"""Tables of the field's protocol (see :mod:`tables`), of as much as is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

from markdown_tables import cell, lines, load, signed
from protocol.plan import OWN

REGIMES = {"default": "50 prompts, four timesteps", "few": "one prompt, one timestep"}


def by_size(file: str, part: str, regime: str, column: str) -> list[str]:
    """A row a method, a column a number of concepts; the best on average first."""
    groups = load(file).get(part, {}).get(regime, {})
    sizes = sorted(groups, key=int)
    methods = dict.fromkeys(name for size in sizes for name in groups[size])

    def entries(name: str) -> list[Mapping[str, Any] | None]:
        return [groups[size].get(name, {}).get(column) for size in sizes]

    def height(name: str) -> tuple[int, float]:
        known = [entry["mean"] for entry in entries(name) if entry]
        return len(known), fmean(known)

    shown = sorted((n for n in methods if any(entries(n))), key=height, reverse=True)
    return lines(
        ("method", *(f"{size} concepts" for size in sizes)),
        [(f"**{n}**" if n == "iteris" else n, *map(cell, entries(n))) for n in shown],
        right=len(sizes),
    )


def nearest(rows: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]] | None:
    """The method of others of which ours is least ahead in likeness, and by how much it is, column
    by column, on the sets that both have."""
    behind = {n: row["behind"] for n, row in rows.items() if "behind" in row and n not in OWN}
    if not behind:
        return None
    return min(behind.items(), key=lambda entry: entry[1]["image"]["mean"])


def leads(file: str) -> list[str]:
    """By how much ours is ahead of the best of the others in likeness: of those that were measured
    on the most sets, and of one that is nearer on fewer."""
    rows = [
        (
            REGIMES[regime],
            size,
            name,
            *(signed(ahead[column]) for column in ("image", "text")),
            str(ahead["image"]["n"]),
        )
        for regime, some in load(file)["regimes"].items()
        for size, methods in sorted(some.items(), key=lambda entry: int(entry[0]))
        for name, ahead in _nearest_ones(methods).items()
    ]
    return lines(("collected", "concepts", "best of the others", "image", "text", "sets"), rows)


def _nearest_ones(rows: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    sets = {n: row["behind"]["image"]["n"] for n, row in rows.items() if "behind" in row}
    most = {name: rows[name] for name, n in sets.items() if n == max(sets.values())}
    return dict(found for some in (most, rows) if (found := nearest(some)))


def cost(file: str) -> list[str]:
    """What a merge of the fewest and of the most takes, by our defaults' regime."""
    groups = load(file)["regimes"]["default"]
    ends = (min(groups, key=int), max(groups, key=int))
    methods = [n for n in groups[ends[1]] if "seconds" in groups[ends[1]][n]]
    rows = [
        (
            f"**{name}**" if name == "iteris" else name,
            *(
                f"{groups[size][name]['seconds']:.1f}" if name in groups[size] else ""
                for size in ends
            ),
            f"{groups[ends[1]][name]['rank']:.0f}",
            f"{groups[ends[1]][name]['bytes'] / 2**20:.2f}",
        )
        for name in sorted(methods, key=lambda n: groups[ends[1]][n]["seconds"])
    ]
    few, most = ends
    head = ("method", f"seconds, {few} concepts", f"{most} concepts", f"rank, {most}", "MiB")
    return lines(head, rows, right=4)


def searched(file: str) -> list[str]:
    """The settings that a search found, by the number of concepts."""
    settings = load(file)["settings"]
    sizes = list(
        dict.fromkeys(k for regimes in settings.values() for v in regimes.values() for k in v)
    )
    rows: list[tuple[str, ...]] = []
    for method, regimes in settings.items():
        for regime, entries in regimes.items():
            found = [_said(entries[k]["settings"]) if entries[k]["searched"] else "" for k in sizes]
            if any(found):
                rows.append((method, REGIMES[regime], *found))
    return lines(("method", "collected", *(f"{k} concepts" for k in sizes)), rows)


def _said(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


TABLES: dict[str, Callable[[], list[str]]] = {
    "reported leads": partial(leads, "reported.json"),
    "reported cost": partial(cost, "reported.json"),
    "reported settings": partial(searched, "reported.json"),
    **{
        f"reported {column} {regime}": partial(by_size, "reported.json", "regimes", regime, column)
        for column in ("image", "share", "text", "judge", "scr")
        for regime in REGIMES
    },
    **{
        f"reported together {column} {regime}": partial(
            by_size, "reported.json", "together", regime, column
        )
        for column in ("image", "success")
        for regime in REGIMES
    },
}
