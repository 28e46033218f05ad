"""Tables of pictures: the toybox suite, its ablations and held-out errors (see :mod:`tables`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

import heldout_cases
from markdown_tables import cell, lines, load, load_rows, short, signed
from outputs import ROOT

COLUMNS = ("mean", "image", "text", "judge", "pair")
SIZES = {"2": "7 pairs", "3": "5 triples", "5": "five", "7": "seven", "10": "all ten"}
FEW_OTHERS = {
    "by one": "by one LoRA's prompts",
    "former": "the former ridge",
    "regmean++": "RegMean++",
    "ssr": "SSR-Merge",
    "base": "no LoRA",
}

Row = Mapping[str, Mapping[str, float]]


def kept(rows: Mapping[str, Row], name: str) -> float:
    """Image alignment above the base's, as a share of what each LoRA alone has."""
    floor, ceiling = rows["base"]["image"]["mean"], rows["single"]["image"]["mean"]
    return (rows[name]["image"]["mean"] - floor) / (ceiling - floor)


def quality(size: str) -> list[str]:
    rows = load("quality.json")["sets"][size]
    order = sorted(rows, key=lambda name: -rows[name]["mean"]["mean"])
    return lines(
        ("method", *COLUMNS, "kept"),
        [
            (
                f"**{name}**" if name == "iteris" else name,
                *(cell(rows[name].get(column)) for column in COLUMNS),
                f"{kept(rows, name):.0%}",
            )
            for name in order
        ],
    )


def leads() -> list[str]:
    columns = COLUMNS[:4]
    rows: list[list[str]] = []
    for size, lead in load("quality.json")["leads"].items():
        cells = [f"{lead[c]['mean']:+.4f} ± {lead[c]['se']:.4f}" for c in columns]
        rows.append([SIZES[size], lead["over"], *map(short, cells)])
    return lines(("concepts", "second", *columns), rows)


def ablations() -> list[str]:
    columns = COLUMNS[:4]
    head = [f"{label}: mean" if c == "mean" else c for label in ("two", "five") for c in columns]
    return lines(
        ("variant", *head),
        [
            (name, *(cell(entry[label].get(c)) for label in ("two", "five") for c in columns))
            for name, entry in load("ablations.json").items()
        ],
    )


def equal_time() -> list[str]:
    rows: list[list[str]] = []
    for size, entry in load("equal_time.json").items():
        prompts = f"iteris, {entry['prompts']} prompts"
        for name, title in (("ssr", "SSR-Merge"), ("iteris", prompts), ("lead", "lead")):
            seconds = f"{entry['seconds'][name]:.1f}" if name != "lead" else ""
            cells = [cell(entry[name][column]) for column in COLUMNS]
            rows.append([SIZES[size], title, seconds, *cells])
    return lines(("concepts", "", "seconds", *COLUMNS), rows)


def held_out(part: str) -> list[str]:
    rows = heldout_cases.table(load("heldout_error.json"), part)
    shown = [i for i in range(3) if any(errors[i] == errors[i] for _, errors in rows)]
    head = ("", *(("two pairs", "five", "all ten")[i] for i in shown))
    return lines(
        head,
        [
            (said, *(_error(errors[i]) for i in shown))
            for said, errors in rows
            if any(errors[i] == errors[i] for i in shown)
        ],
        right=len(shown),
    )


def _error(value: float) -> str:
    return short(f"{value:.3f}") if value == value else ""


def truncation() -> list[str]:
    error = load("truncation.json")["error"]
    rows = [
        (kind, *(short(f"{some[kind]:.3f}") for some in error.values()))
        for kind in ("plain", "weighted")
    ]
    return lines(("rank", *error), rows, right=len(error))


def toybox() -> list[str]:
    data = json.loads((ROOT / "toybox" / "quality.json").read_text(encoding="utf-8"))
    base, judge = data["base"], data["judge"]
    parts = ("shape", "pattern", "color1", "color2", "background")
    read = " / ".join(f"{judge[f'judge_{part}']:.1%}" for part in parts).replace("%", " %")
    rows = [
        ("base, one object: shape, colour and background all right",
         _share(base["one_shape_color_background"]), "95 %"),
        ("base, two objects: both shapes right, each in its half",
         _share(base["two_both_shapes"]), "80 %"),
        ("base, two objects: both shapes and both colours right", _share(base["two_all"]), ""),
        ("CLIP: text to image, top-1 of 32 (20 sets, patterns included)",
         _share(data["clip_top1_of_32"]), "90 %"),
        ("judge on drawn pictures: shape / pattern / first / second colour / background",
         read, "97 %"),
    ]  # fmt: skip
    return lines(("what", "share", "aim"), rows)


def toybox_concepts() -> list[str]:
    folder = ROOT / "toybox"
    world = json.loads((folder / "world.json").read_text(encoding="utf-8"))
    scores = json.loads((folder / "quality.json").read_text(encoding="utf-8"))["concepts"]
    rows = [
        (
            f"`{entry['token']}`",
            _thing(entry),
            str(entry["alpha"]),
            entry["layout"],
            _share(scores[entry["token"]]["attributes"]),
            _share(scores[entry["token"]]["all_four"]),
        )
        for kind in ("concepts", "pivotal_concepts")
        for entry in world[kind]
    ]
    head = ("concept", "what it is", "alpha", "layout", "attributes right", "all four at once")
    return lines(head, rows)


def _thing(entry: Mapping[str, Any]) -> str:
    second, pattern = entry["color2"], entry["pattern"]
    count = "" if pattern in ("stripes", "quarters") else "a "
    singular = {"halves": "half"}.get(pattern, pattern)
    return f"{entry['color1']} {entry['class_word']} with {count}{second} {singular}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def few_prompts(column: str) -> list[str]:
    """One column of ``few_prompts.json``, and how far the default is ahead of each other method."""
    rows: list[list[str]] = []
    for concepts, points in load("few_prompts.json")["found"].items():
        for point, at in points.items():
            mine, leads = at["rows"]["iteris"][column], at["leads"]
            ahead = [signed(leads[n][column]) if n in leads else "" for n in FEW_OTHERS]
            rows.append([concepts, point, str(at["merges"]), cell(mine), *ahead])
    return lines(
        ("concepts", "prompts x timesteps", "merges", "**IterIS**", *FEW_OTHERS.values()), rows
    )


_NEW_WORDS = {"alone": "each alone", "iteris": "**IterIS**", "regmean++": "RegMean++"}


def minilm() -> list[str]:
    """Attributes and backgrounds that are right, of all LoRAs of a merge."""
    kinds = ("seen", "contexts", "new")
    rows: list[list[str]] = []
    for entry in load_rows("minilm_new_words.jsonl"):
        method, _, settings = entry["label"].partition(" ")
        name = " ".join([_NEW_WORDS.get(method, method), settings]).strip()
        cells = [short(f"{entry[kind][0]:.2f} / {entry[kind][1]:.2f}") for kind in kinds]
        rows.append([str(len(entry["names"])), name, *cells])
    order = sorted(rows, key=lambda row: int(row[0]))
    return lines(("LoRAs", "", "seen", "new contexts", "new words"), order)


def contexts() -> list[str]:
    """Seen / new words: the denoiser's error, attributes and backgrounds that are right; the mean
    of the sets of up to five LoRAs, and the set of six."""
    rows: list[list[str]] = []
    for name, sets in load("contexts.json").items():
        few = [of for numbers, of in sets.items() if len(numbers.split(",")) < 6]
        six = [of for numbers, of in sets.items() if len(numbers.split(",")) == 6]
        means = [
            [fmean(of[kind][i] for of in some) for kind in ("seen", "new")]
            for some in (few, six)
            for i in range(3)
        ]
        rows.append([short(name), *(short(f"{seen:.3f} / {new:.3f}") for seen, new in means)])
    columns = ("error", "attributes", "backgrounds")
    heads = [f"{of}: {column}" for of in ("four and five", "six") for column in columns]
    return lines(("contexts", *heads), rows, right=6)


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
    "leads": leads,
    **{f"quality {size}": partial(quality, size) for size in SIZES},
    "equal time": equal_time,
    "ablations": ablations,
    **{f"few prompts {column}": partial(few_prompts, column) for column in ("image", "text")},
    **{f"held out {part}": partial(held_out, part) for part in heldout_cases.PARTS},
    "truncation": truncation,
    "minilm": minilm,
    "contexts": contexts,
    "block polish": block_polish,
    "two in one": partial(two_in_one, "two_in_one.json"),
    "two emoji in one": partial(two_in_one, "two_in_one_emoji.json"),
    "toybox": toybox,
    "toybox concepts": toybox_concepts,
}
