"""Tables of speed and memory (see :mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from markdown_tables import load, runs, short, shown, table


def memory() -> list[str]:
    """A merge's planned memory on full-size models, by the computer's memory."""
    rows = [
        [
            name,
            f"{entry['budget_gib']} GiB",
            f"{host} GiB",
            f"{made['peak_gib']:.1f} GiB",
            f"{made['host_gib']:.0f} GiB" if made["host_gib"] else "",
            f"{made['left_out']} of {made['rows'] + made['left_out']}",
            made["forwards"],
            made["tera_operations"],
            _way(made["way"]),
        ]
        for name, entry in load("memory.json").items()
        for host, made in entry["by_host"].items()
    ]
    head = (
        *("", "card's budget", "computer's", "held on the card", "in the computer's memory"),
        *("rows left out", "forwards", "10¹² operations", "how"),
    )
    return table(head, rows)


def _way(way: str) -> str:
    place, _, blocks = way.partition(", ")
    there = "there" if place == "waiting in host memory" else "on the device"
    return blocks or f"rows wait {there}"


def waiting() -> list[str]:
    """Memory of waiting rows on full-size models, if they wait at every site."""
    sizes = {name: entry["waiting_mib"] for name, entry in load("memory.json").items()}
    rows = [[name, f"{mib:.0f} MiB", f"{mib * 400 / 1024:.0f} GiB"] for name, mib in sizes.items()]
    return table(("model, half precision", "a sample's two rows wait with", "400 samples"), rows)


_RATE = 100.0  # 10¹² operations a second
_RUNGS = {"default": "default", "best": "`best`", "fast": "`fast`"}


def ladder() -> list[str]:
    """What presets cost on full-size models, and what they keep of the reported concepts above the
    base: alone, and in the mean of the other conditions of use."""
    each = {
        name.partition(",")[0]: (made := entry["by_host"]["80"])["tera_operations"]
        / made["forwards"]
        for name, entry in load("memory.json").items()
        if name.startswith(("SD 1.5", "SDXL", "FLUX", "Z-Image"))
    }
    rows = [
        [
            f"{size} LoRAs, {_RUNGS[rung]}",
            f"{forwards:.0f}",
            *(f"{forwards * one / _RATE / 60:.1f}" for one in each.values()),
            *(f"{share:.2f}" for share in shares),
            count,
        ]
        for (size, rung), (forwards, _, *shares), count in _kept_by_rung()
        if rung in _RUNGS
    ]
    return table(("", "forwards", *(f"{name}, min" for name in each), *_KEPT, "n"), rows)


_KEPT = ("likeness kept", "attributes", "likeness in other uses", "attributes")


def side_by_side() -> list[str]:
    """SSR-Merge's own code, RegMean++, Chain of Merges and IterIS on the same prompts."""
    every = runs("side_by_side.json")
    prompts = {rung: of for rung, of in _PROMPTS.items() if any(key[2] == rung for key in every)}
    labels = {method.partition(":")[0]: method for *_, method in every}
    rows = [
        [
            f"{size} LoRAs on FLUX's blocks",
            name,
            *(_cost(every.get(("emoji", size, rung, labels[head]))) for rung in prompts),
        ]
        for size in sorted({size for _, size, *_ in every})
        for head, name in _SIDES.items()
    ]
    return table(("", "", *prompts.values()), rows, labels=2)


def _cost(of: Mapping[str, Any] | None) -> str:
    if of is None:
        return ""
    kept = short(f"{of['kept']:.2f} / {of['others']:.2f}")
    return f"{kept}, {of['forwards']} in {of['seconds']:.0f} s, {of['peak']:.1f} GiB"


_SIDES = {
    "ssr-merge": "SSR-Merge, own code",
    "regmean++": "RegMean++",
    "chain-of-merges": "Chain of Merges",
    "iteris": "**IterIS**",
}
_PROMPTS = {"least": "one prompt", "fast": "`fast`", "default": "default", "best": "`best`"}


def _kept_by_rung() -> Iterator[tuple[tuple[int, str], list[float], int]]:
    """Size and rung; means over sets of forwards and seconds, and shares kept, of means over sets
    and uses; number of sets. Fewest forwards first."""
    every = runs("ladder.json")
    found: dict[tuple[int, str], list[tuple[str, ...]]] = {}
    for (rung, *names), of in every.items():
        if "forwards" in of:
            found.setdefault((len(names), rung), []).append(tuple(names))

    def mean(rung: str, sets: Sequence[tuple[str, ...]], uses: Sequence[str], figure: str) -> float:
        return fmean(every[(rung, *names)][use][figure] for names in sets for use in uses)

    def share(rung: str, sets: Sequence[tuple[str, ...]], uses: Sequence[str], of: str) -> float:
        one, base, alone = (mean(which, sets, uses, of) for which in (rung, "base", "alone"))
        return (one - base) / (alone - base)

    costs = {
        key: [fmean(every[(key[1], *n)][cost] for n in sets) for cost in ("forwards", "seconds")]
        for key, sets in found.items()
    }
    for (size, rung), sets in sorted(found.items(), key=lambda one: (one[0][0], costs[one[0]])):
        uses = [use for use, of in every[("base", *sets[0])].items() if isinstance(of, dict)]
        shares = [
            share(rung, sets, some, figure)
            for some in (["plain"], [use for use in uses if use != "plain"])
            for figure in ("likeness", "judge")
        ]
        yield (size, rung), [*costs[size, rung], *shares], len(sets)


def ratios() -> list[str]:
    """Peer over ours, ours over the bare forward, and ways to run a sweep over all rows waiting on
    the device; where a part has several figures the worst for us counts."""
    raw = load("speed.json")["raw"]
    found = {
        "vs_peft_svd": raw["peft"]["svd"]["ratio"],
        "floor": max(of["floor"] for part, of in raw.items() if part.startswith("floor")),
        **raw["ways toybox"]["ratios"],
    }
    return table(("ratio", "value"), found.items(), 2)


FLOORS = {
    "floor sd15-50": "SD 1.5 at full size, two LoRAs, 50 prompts each at 256 pixels",
    "floor sd15": "the same with 16 prompts each",
    "floor t5": "T5-base, two tasks, 50 texts of 128 tokens",
    "floor toybox": "toybox, two concepts, 50 prompts at four timesteps",
}


def floors() -> list[str]:
    data = load("speed.json")
    rows: list[list[str]] = []
    for part, what in FLOORS.items():
        entry = data["raw"][part]
        merges = [
            f"{entry[merge]:.1f} s, {shown(entry[floor], 2)}" if merge in entry else ""
            for merge, floor in (
                ("merge without repair", "floor without repair"),
                ("merge", "floor"),
            )
        ]
        name = f"{what} (rounds: {data['rounds'][part]})"
        rows.append([name, f"{entry['bare']:.1f} s", *merges])
    return table(("", "bare", "without repair", "merge"), rows)


PARTS = {
    "parts sd15": "SD 1.5 at half of its widths, 256 pixels, 50 prompts",
    "parts emoji": "FLUX in miniature, 50 prompts",
    "parts flux": "a block of each kind at FLUX.1's widths, 16 prompts",
}


def parts() -> list[str]:
    """A merge of two LoRAs over its bare forwards, and its parts."""
    raw = load("speed.json")["raw"]
    heads = [head for head in raw["parts emoji"] if head != "bare seconds"]
    rows = [
        [what, f"{raw[part]['bare seconds']:.0f} s", *(raw[part][head] for head in heads)]
        for part, what in PARTS.items()
        if part in raw
    ]
    return table(("", "bare", *heads), rows, 2)


TABLES: dict[str, Callable[[], list[str]]] = {
    "memory": memory,
    "waiting": waiting,
    "ladder": ladder,
    "parts": parts,
    "side by side": side_by_side,
    "ratios": ratios,
    "floors": floors,
}
