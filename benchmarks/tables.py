"""The tables of the README and of ``benchmarks/README.md`` from the JSON in ``results/``, as
Markdown on stdout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("mean", "image", "text", "judge", "pair")
NAMES = {"2": "7 pairs", "3": "5 triples", "5": "five", "7": "seven", "10": "all ten"}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def cell(entry: dict[str, float] | None) -> str:
    if entry is None:
        return ""
    error = "" if entry["se"] is None else f" ± {entry['se']:.3f}"
    return f"{entry['mean']:.3f}{error}".replace("0.", ".")


def quality() -> None:
    for size, rows in load("quality.json")["sets"].items():
        print(f"\n### {NAMES[size]}\n")
        print("| method | " + " | ".join(COLUMNS) + " | kept |")
        print("|---|" + "---|" * (len(COLUMNS) + 1))
        order = sorted(rows, key=lambda name: -rows[name]["mean"]["mean"])
        for name in order:
            row = rows[name]
            shown = f"**{name}**" if name == "iteris" else name
            cells = " | ".join(cell(row.get(column)) for column in COLUMNS)
            print(f"| {shown} | {cells} | {_kept(rows, name):.0%} |")


def leads() -> None:
    columns = COLUMNS[:4]
    print(
        "\n| concepts | second | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns)
    )
    for size, lead in load("quality.json")["leads"].items():
        cells = " | ".join(f"{lead[c]['mean']:+.4f} ± {lead[c]['se']:.4f}" for c in columns)
        print(f"| {NAMES[size]} | {lead['over']} | {cells.replace('0.', '.')} |")


def ablations() -> None:
    print("\n| variant | two: mean | image | text | judge | five: mean | image | text | judge |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, entry in load("ablations.json").items():
        cells = [cell(entry[label].get(c)) for label in ("two", "five") for c in COLUMNS[:4]]
        print(f"| {name} | " + " | ".join(cells) + " |")


def equal_time() -> None:
    print("\n| concepts | | seconds | " + " | ".join(COLUMNS) + " |")
    print("|---|---|---|" + "---|" * len(COLUMNS))
    for size, entry in load("equal_time.json").items():
        prompts = f"iteris, {entry['prompts']} prompts"
        for name, title in (("ssr", "SSR-Merge"), ("iteris", prompts), ("lead", "lead")):
            seconds = f"{entry['seconds'][name]:.1f}" if name != "lead" else ""
            cells = " | ".join(cell(entry[name][column]) for column in COLUMNS)
            print(f"| {NAMES[size]} | {title} | {seconds} | {cells} |")


def speed() -> None:
    data = load("speed.json")
    print("\n| ratio | value |\n|---|---|")
    for name, value in data["ratios"].items():
        print(f"| {name} | {value:.2f} |")
    for what, entries in data["raw"].get("growth", {}).items():
        print(f"\n| {what} | seconds | peak MiB |\n|---|---|---|")
        for value, entry in entries.items():
            print(f"| {value} | {entry['seconds']:.2f} | {entry['peak_mib']:.0f} |")


REPORTED = ("image", "share", "kept", "text", "judge", "scr")


def reported() -> None:
    """The field's protocol on the concepts that nobody looked at (``PROTOCOL.md``)."""
    data = load("reported.json")
    print(f"\n{data['measured']} of {data['planned']} merges, {data['replicates']} replicates")
    for regime, sizes in data["regimes"].items():
        for size in sorted(sizes, key=int):
            rows, together = sizes[size], data["together"][regime][size]
            print(f"\n### {regime}, {size} LoRAs\n")
            print("| method | " + " | ".join(REPORTED) + " | pair | success | s | rank | MB |")
            print("|---|" + "---|" * (len(REPORTED) + 5))
            for name in sorted(rows, key=lambda name: -rows[name]["image"]["mean"]):
                row, pair = rows[name], together.get(name, {})
                cells = [cell(row.get(column)) for column in REPORTED]
                cells += [cell(pair.get(column)) for column in ("image", "success")]
                cells += [f"{row['seconds']:.1f}", f"{row['rank']:.0f}"] if pair else ["", ""]
                cells += [f"{row['bytes'] / 1e6:.1f}"] if pair else [""]
                shown = f"**{name}**" if name == data["default"] else name
                print(f"| {shown} | " + " | ".join(cells) + " |")
    print("\n| regime | LoRAs | ahead of | image | text |\n|---|---|---|---|---|")
    for regime, sizes in data["leads"].items():
        for size, lead in sorted(sizes.items(), key=lambda item: int(item[0])):
            ahead = " | ".join(_signed(lead[column]) for column in ("image", "text"))
            print(f"| {regime} | {size} | {lead['over']} | {ahead} |")


def _signed(entry: dict[str, Any]) -> str:
    error = "" if entry["se"] is None else f" ± {entry['se']:.4f}"
    return f"{entry['mean']:+.4f}{error}".replace("0.", ".")


FRONT = {
    "single": "each LoRA alone",
    "iteris": "**IterIS**",
    "regmean++": "RegMean++",
    "regmean": "RegMean",
    "ssr": "SSR-Merge",
    "average": "average",
    "sum": "all loaded at once",
}
IN_LANGUAGE = {"single": "alone", "average": "linear"}
"""What a method is called in ``language.json``."""


def front() -> None:
    """The README's table: likeness kept, two concepts in one picture, and texts, where we lose."""
    sets, texts = load("quality.json")["sets"], load("language.json")["sum"]
    print("| | two | three | five | seven | ten | two in one picture | texts |")
    print("|---|" + "---:|" * 7)
    for name, label in FRONT.items():
        cells = [f"{_kept(rows, name):.0%}" for rows in sets.values()]
        pair, text = sets["2"][name].get("pair"), texts.get(IN_LANGUAGE.get(name, name))
        cells += [f"{pair['mean']:.0%}" if pair else "", f"{text:.2f}" if text else ""]
        print(f"| {label} | {' | '.join(cells)} |")


def _kept(rows: dict[str, Any], name: str) -> float:
    floor, ceiling = rows["base"]["image"]["mean"], rows["single"]["image"]["mean"]
    return (rows[name]["image"]["mean"] - floor) / (ceiling - floor)


if __name__ == "__main__":
    for table in (front, quality, leads, equal_time, reported, ablations, speed):
        try:
            table()
        except FileNotFoundError as missing:
            print(f"\n({missing.filename} is not there)")
