"""Every table of the pages by its name, from ``results/`` (see :mod:`tables`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from markdown_tables import half_width, lead, load, runs_of, share, shown, table
from protocol.figures import stat
from protocol.plan import SINGLE

Columns = Sequence[tuple[str, str]]
NAMES = {"single": "each LoRA alone"}
COLUMNS: Columns = (
    ("seen", "likeness"),
    ("seen", "judge"),
    *((kind, name) for kind in ("pair", "halves", "three") for name in ("right", "complete")),
    *(("styled", name) for name in ("judge", "style", "both")),
    ("subject", "judge"),
    ("style", "style"),
    ("new words", "likeness"),
    *(("new words", name) for name in ("likeness kept", "dino", "text")),
    ("new words", "judge"),
    ("new words", "scene"),
    ("no trigger", "likeness"),
    ("spread", "share of pixels"),
)
"""Kind of prompt and figure of each column; a table has those that were measured."""

UNJUDGED = {("new words", name) for name in ("likeness kept", "dino", "text")}
"""Columns of worlds in which nothing judges attributes."""


def unseen(data: Mapping[str, Any], size: str) -> list[str]:
    """Means over sets and, in brackets, our lead with half the width of the paired 95 % interval;
    bold if the verdict is *first* or *behind*."""
    found = data["sizes"][size]
    known = {(kind, name) for of in found["rows"].values() for kind in of for name in of[kind]}
    if ("new words", "judge") in known:
        known -= UNJUDGED
    columns = [column for column in COLUMNS if column in known]
    rows: list[list[str]] = []
    for label, kinds in found["rows"].items():
        ahead = found["against"].get(label, {})
        cells = [_with_lead(kinds, ahead, kind, name) for kind, name in columns]
        sets = max(figure["sets"] for of in kinds.values() for figure in of.values())
        name = f"**{label}**" if label == data["default"] else NAMES.get(label, label)
        rows.append([name, str(sets), *cells])
    head = (f"{size} LoRAs", "sets", *(f"{kind}: {name}" for kind, name in columns))
    return table(head, rows)


def _with_lead(kinds: Mapping[str, Any], ahead: Mapping[str, Any], kind: str, name: str) -> str:
    figure, ours = kinds.get(kind, {}).get(name), ahead.get(kind, {}).get(name)
    if figure is None or ours is None:
        return "" if figure is None else shown(figure["mean"])
    text = f"({lead(ours)})"
    apart = ours["verdict"] in ("first", "behind")
    return f"{shown(figure['mean'])} **{text}**" if apart else f"{shown(figure['mean'])} {text}"


FRONT = {
    "iteris": "**IterIS**",
    "chain-of-merges:conditions=0": "Chain of Merges",
    "regmean++:contexts=0:generic=0:conditions=0": "RegMean++",
    "average": "average",
}
TOGETHER = ("sum", "task-arithmetic:scale=0.7", "task-arithmetic:scale=0.4")
"""All LoRAs loaded at once, at three strengths."""
KEPT = ("likeness kept", "judge kept")


def front() -> list[str]:
    """The README's: shares kept of likeness and attributes on new words."""
    return kept("unseen_reported.json")


def kept(file: str) -> list[str]:
    """A column for each number of LoRAs: likeness and attributes kept by method; of ours the
    interval, the median set, the worst one, and the share of concepts that keep less than half."""
    sizes = {size: of["rows"] for size, of in sorted(load(file)["sizes"].items(), key=_number)}
    ours = [[of["iteris"]["new words"][name] for name in KEPT] for of in sizes.values()]
    rows = [
        [label, *(_shares(of.get(name), "mean") for of in sizes.values())]
        for name, label in FRONT.items()
        if any(name in of for of in sizes.values())
    ]
    best = [together(of) for of in sizes.values()]
    rows.append(["all at once, best of three strengths", *(_shares(of, "mean") for of in best)])
    each = {
        "IterIS, 95 % interval": lambda of: f"± {100 * half_width(of):.0f}",
        "median set": lambda of: f"{of['median']:.0%}",
        "worst set": lambda of: f"{of['least']:.0%}",
        "concepts that keep less than half": lambda of: f"{of['collapsed']:.0%}",
    }
    if all(two[0]["sets"] < 3 for two in ours):
        del each["median set"]
    rows += [[label, *(" / ".join(map(cell, two)) for two in ours)] for label, cell in each.items()]
    rows.append(["sets", *(str(two[0]["sets"]) for two in ours)])
    return table(("likeness / attributes", *(f"{size} LoRAs" for size in sizes)), rows)


LEAD = {
    "iteris": "**IterIS**",
    "iteris:repair=false": "IterIS without repair",
    "iteris:weighting=none:saliency=0:bound=0:conditions=0": "Chain of Merges with repair",
    "iteris:rank=8:share_ranks=true": "IterIS in the size of one LoRA",
    "chain-of-merges:conditions=0": "Chain of Merges",
}


def carries_the_lead() -> list[str]:
    """Size of the file, and shares of likeness and attributes kept on new words."""
    sizes = load("unseen_reported_lead.json")["sizes"]
    rows: list[list[str]] = []
    for name, label in LEAD.items():
        cells: list[str] = []
        for size, of in sizes.items():
            runs = runs_of("unseen_reported_lead_runs.jsonl", name, int(size))
            cells.append(f"{fmean(run['bytes'] for run in runs) / 1e6:.2f}")
            cells.append(_shares(of["rows"].get(name), "mean"))
        rows.append([label, *cells])
    heads = (cell for size in sizes for cell in (f"{size} LoRAs: MB", "likeness / attributes"))
    return table(("kept", *heads), rows)


def together(rows: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """All LoRAs loaded at once, at the strength with the most likeness."""
    some = [rows[name] for name in TOGETHER if name in rows]
    return max(some, key=lambda of: of["new words"]["likeness"]["mean"], default=None)


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


def _shares(row: Mapping[str, Any] | None, of: str) -> str:
    return " / ".join(f"{row['new words'][name][of]:.0%}" for name in KEPT) if row else ""


def conditions(*, further: bool = False) -> list[str]:
    """Attributes and backgrounds under conditions of use, means over sets and trainings: strengths
    and LoRAs beside, or the ``further`` ones."""
    rows: list[list[str]] = []
    for (size, label), sets in sorted(_under_conditions().items(), key=lambda item: item[0][0]):
        heads = _uses(further=further)
        some = [of for of in sets.values() if heads[-1] in of]
        if not some:
            continue
        name = NAMES.get(label, label.removesuffix(":conditions=0").replace(":", " "))
        norms = [of["norm"] for of in some if "norm" in of]
        norm = [] if further else [f"{fmean(norms):.1f}" if norms else ""]
        cells = [_cell([of[head] for of in some if head in of]) for head in heads]
        rows.append([f"{size} LoRAs, n {len(some)}", name, *norm, *cells])
    return table(("", "", *([] if further else ["norm"]), *_uses(further=further)), rows)


def conditions_lead() -> list[str]:
    """Attributes of IterIS less those of Chain of Merges, paired by set and training."""
    found, rows = _under_conditions(), list[list[str]]()
    for size in sorted({size for size, _ in found}):
        ours, theirs = found[size, "iteris"], found[size, "chain-of-merges:conditions=0"]
        both = [key for key in ours if key in theirs]
        if len(both) > 2:
            less = [[ours[k][h]["judge"] - theirs[k][h]["judge"] for k in both] for h in _uses()]
            rows.append([f"{size} LoRAs, n {len(both)}", *(lead(_over_sets(one)) for one in less)])
    return table(("", *_uses()), rows)


def gated(file: str = "gated.json", layers: str = "attention") -> list[str]:
    """The denoiser's error on new prompts of LoRAs cut to their attention ``layers``, or of all,
    means over sets; and IterIS less Chain of Merges, paired by set."""
    runs = {tuple(json.loads(k)): of for k, of in load(file)["runs"].items()}
    found: dict[int, dict[str, dict[tuple[str, ...], dict[str, float]]]] = {}
    for (of_these, label, *names), of in runs.items():
        if of_these == layers:
            found.setdefault(len(names), {}).setdefault(label, {})[tuple(names)] = of
    heads = [head for head in next(iter(runs.values())) if head != "seconds"]
    rows: list[list[str]] = []
    for size, sets in sorted(found.items()):
        for label, of in sorted(sets.items()):
            means = [f"{fmean(one[head] for one in of.values()):.3f}" for head in heads]
            rows.append([f"{size} LoRAs, n {len(of)}", label.partition(":")[0], *means])
        ours, theirs = sets["iteris"], sets["chain-of-merges:conditions=0"]
        less = [[ours[k][head] - theirs[k][head] for k in ours] for head in heads]
        rows.append(["", "the difference", *(lead(_over_sets(one)) for one in less)])
    return table(("", "", *heads), rows)


def wordless() -> list[str]:
    """Of pictures with a subject's trigger and without one: the share in the look, and of the
    subject's attributes."""
    return _by_subjects("wordless_reported.json", ("style", "judge", "no trigger"))


def slider() -> list[str]:
    """At a slider's strengths: the size of what is drawn, the share of the subject's attributes,
    and the size without a trigger."""
    return _by_subjects("slider_toybox.json", ("size", "judge", "no trigger"))


def _by_subjects(file: str, figures: Sequence[str]) -> list[str]:
    """Figures of a LoRA without words beside subjects, in each use; means over sets."""
    runs = {tuple(json.loads(k)): of for k, of in load(file)["runs"].items()}
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for (_, label, *names), of in runs.items():
        found.setdefault((len(names), label), []).append(of)
    uses = [use for use in next(iter(runs.values())) if use != "norm"]
    rows = [
        [f"{size} subjects, n {len(sets)}", label]
        + [
            " / ".join(f"{fmean(of[use][name] for of in sets):.2f}" for name in figures)
            for use in uses
        ]
        for (size, label), sets in sorted(found.items(), key=lambda item: item[0][0])
    ]
    return table(("", "", *uses), rows)


def tidy() -> list[str]:
    """One LoRA kept to its trigger, by world and concept; of an emoji the likeness."""
    rows: list[list[str]] = []
    for world in ("reported", "toybox", "emoji"):
        figure = "likeness" if world == "emoji" else "judge"
        for name, of in load(f"tidy_{world}.json")["runs"].items():
            found = (of[f"{figure} LoRA"], of[f"{figure} tidied"], of["class"], of["others"])
            rows.append([world, name, *(f"{one:.2f}" for one in found)])
    return table(("world", "concept", "LoRA", "tidied", "class", "others"), rows)


def _over_sets(values: Sequence[float]) -> dict[str, Any]:
    return stat({(number, ()): {"": value} for number, value in enumerate(values)})


def _under_conditions() -> dict[tuple[int, str], dict[str, Any]]:
    """Size and method → set and training → figures; each LoRA alone first."""
    runs = {tuple(json.loads(k)): of for k, of in load("conditions_reported.json")["runs"].items()}
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for (label, trained, rest, *names), of in runs.items():
        if label == SINGLE:
            continue
        key = json.dumps([trained, *names])
        if label == "iteris":
            alone = [runs[SINGLE, trained, rest, name] for name in names]
            mean = {use: _mean([one[use] for one in alone]) for use in alone[0] if use in of}
            found.setdefault((len(names), SINGLE), {})[key] = mean
        found.setdefault((len(names), label), {})[key] = of
    return found


def _uses(*, further: bool = False) -> list[str]:
    """The conditions of use that all sets have, or the ``further`` ones."""
    runs = load("conditions_reported.json")["runs"].values()
    heads = dict.fromkeys(use for of in runs for use in of if use not in ("norm", "seconds"))
    return [head for head in heads if further == any(head not in of for of in runs)]


def _mean(pictures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: fmean(of[name] for of in pictures) for name in pictures[0]}


def _cell(sets: Sequence[Mapping[str, float]]) -> str:
    mean = _mean(sets) if sets else {}
    return " / ".join(f"{mean[name]:.2f}" for name in ("judge", "scene") if mean)


def speed_lora() -> list[str]:
    """Shares kept by four-step images on new words."""
    sizes, figures = load("speed_lora.json")["sizes"], ("likeness kept", "judge kept")
    columns = [(size, name) for size in sorted(sizes, key=int) for name in figures]
    rows = [
        [label, *(share(sizes[s]["rows"][label]["new words"][name]) for s, name in columns)]
        for label in next(iter(sizes.values()))["rows"]
    ]
    return table(("four steps", *(f"{size} LoRAs: {name}" for size, name in columns)), rows)


METHODS = {
    "alone": "each LoRA alone",
    "linear": "linear",
    "task-arithmetic": "task arithmetic (0.4)",
    "ties": "TIES",
    "dare": "DARE (0.4)",
    "regmean": "RegMean (0.9)",
    "ssr": "SSR",
    "iteris-paper": "Algorithm 1 as in the paper",
    "iteris": "**IterIS**, defaults",
    "iteris-shrink": "IterIS, `shrink=0.5`",
}


def emotions() -> list[str]:
    """The best sum first."""
    data = load("language.json")
    tasks = ("Emoint", "EC", "TEC", "ISEAR")
    rows = [
        [
            METHODS[name],
            *(data["tasks"][name][task] for task in tasks),
            {"mean": data["sum"][name], "se": data["standard_error"].get(name)},
        ]
        for name in sorted(data["sum"], key=lambda name: -data["sum"][name])
    ]
    return table(("method", *tasks, "sum"), rows)


UNSEEN: Mapping[str, tuple[str, Sequence[str]]] = {
    "reported": ("unseen_reported.json", ("2", "3", "5", "7", "10")),
    "framed": ("unseen_framed.json", ("5",)),
    "minilm": ("unseen_minilm.json", ("2", "3", "5", "8")),
    "styles": ("unseen_styles.json", ("2",)),
    "rows": ("two_in_one.json", ("2",)),
}
"""Table name → file, and the numbers of LoRAs, with one table each."""


def _unseen(name: str, size: str) -> tuple[str, Callable[[], list[str]]]:
    file, sizes = UNSEEN[name]
    return (
        f"unseen {name} {size}" if len(sizes) > 1 else f"unseen {name}",
        lambda: unseen(load(file), size),
    )


TABLES: dict[str, Callable[[], list[str]]] = {
    "front": front,
    "front minilm": lambda: kept("unseen_minilm.json"),
    "lead": carries_the_lead,
    "conditions": conditions,
    "conditions further": lambda: conditions(further=True),
    "conditions lead": conditions_lead,
    "gated": gated,
    "gated all": lambda: gated(layers="all"),
    "wordless": wordless,
    "slider": slider,
    "tidy": tidy,
    "speed LoRA": speed_lora,
    "emotions": emotions,
    **dict(_unseen(name, size) for name, (_, sizes) in UNSEEN.items() for size in sizes),
}
