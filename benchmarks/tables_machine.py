"""Tables of time and memory (see :mod:`tables`)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from markdown_tables import lines, load, short

GROWTH = ("loras", "rank", "samples", "samples in 128 MiB")
FLOORS = {
    "floor sd15-50": "SD 1.5 at full size, two LoRAs, 50 prompts each at 256 pixels",
    "floor sd15": "the same with 16 prompts each",
    "floor t5": "T5-base, two tasks, 50 texts of 128 tokens",
    "floor toybox": "toybox, two concepts, 50 prompts at four timesteps",
}
_GIB = 1024


def memory() -> list[str]:
    """What a merge takes of models of full size, by the plan and the computer's memory."""
    rows = [
        (
            name,
            f"{entry['budget_gib']} GiB",
            f"{host} GiB",
            f"{made['peak_gib']:.1f} GiB",
            f"{made['host_gib']:.0f} GiB" if made["host_gib"] else "",
            f"{made['left_out']} of {made['rows'] + made['left_out']}",
            str(made["forwards"]),
            str(made["tera_operations"]),
            _way(made["way"]),
        )
        for name, entry in load("memory.json").items()
        for host, made in entry["by_host"].items()
    ]
    head = (
        *("", "card's budget", "computer's", "held on the card", "in the computer's memory"),
        *("rows left out", "forwards", "10¹² operations", "how"),
    )
    table = lines(head, rows, right=8)
    table[1] = table[1].removesuffix("---:|") + "---|"
    return table


def _way(way: str) -> str:
    place, _, blocks = way.partition(", ")
    return blocks or {"waiting in host memory": "rows wait there"}.get(
        place, "rows wait on the device"
    )


def waiting() -> list[str]:
    """What rows wait with, where they wait at every site, of models of full size."""
    rows = [
        (
            name,
            f"{entry['waiting_mib']:.0f} MiB",
            f"{entry['waiting_mib'] * 400 / _GIB:.0f} GiB",
        )
        for name, entry in load("memory.json").items()
    ]
    return lines(("model, half precision", "a sample's two rows wait with", "400 samples"), rows, 2)


def ratios() -> list[str]:
    rows = [(name, f"{value:.2f}") for name, value in load("speed.json")["ratios"].items()]
    return lines(("ratio", "value"), rows)


def growth(what: str) -> list[str]:
    entries = load("speed.json")["raw"]["growth"][what]
    rows = [(n, f"{e['seconds']:.2f}", f"{e['peak_mib']:.0f}") for n, e in entries.items()]
    return lines((what, "seconds", "peak MiB"), rows)


def floors() -> list[str]:
    data = load("speed.json")
    rows: list[tuple[str, ...]] = []
    for part, what in FLOORS.items():
        entry = data["raw"][part]
        without = ""
        if "merge without repair" in entry:
            without = f"{entry['merge without repair']:.1f} s, {entry['floor without repair']:.2f}"
        merge = f"{entry['merge']:.1f} s, {entry['floor']:.2f}"
        rounds = data["rounds"][part]
        rows.append((f"{what} (rounds: {rounds})", f"{entry['bare']:.1f} s", without, merge))
    return lines(("", "bare", "without repair", "merge"), rows)


def parts() -> list[str]:
    """Seconds of a merge on the toybox by what they go to, beside those of a bare forward."""
    data = load("parts.json")["toybox"]
    order = sorted(data["merge"], key=lambda part: -data["merge"][part])
    rows = [
        (part, *(short(f"{data[what][part]:.2f}") if part in data[what] else "" for what in data))
        for part in order
    ]
    return lines(("part", *data), rows, right=len(data))


TABLES: dict[str, Callable[[], list[str]]] = {
    "memory": memory,
    "waiting": waiting,
    "ratios": ratios,
    **{f"growth, {what}": partial(growth, what) for what in GROWTH},
    "floors": floors,
    "parts": parts,
}
