"""Tables of ``docs/results.md``: verdicts from intervals, and what the plot shows (see
:mod:`tables`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markdown_tables import figures, lead, load, short, table
from new_words_tables import FRONT
from outputs import ROOT
from protocol.figures import LESS, ONE_TRAINING, separated

PLOT = ROOT / "docs" / "images" / "results-kept.svg"
RUNS = "unseen_reported"
NEW = "new words"
MEASURES = {"likeness": "likeness", "judge": "attributes"}
NAMES = {**{name: label.strip("*") for name, label in FRONT.items()}, "sum": "all loaded at once"}
OTHERS = {"regmean++": "RegMean++", "ssr": "SSR-Merge", "task-arithmetic": "all at once, weaker"}
REGIMES = (
    ("{} LoRAs", RUNS, ""),
    ("{} LoRAs, pretrained text encoder", "unseen_minilm", " (MiniLM)"),
    ("{} LoRAs, FLUX's blocks", "unseen_emoji", " (FLUX's blocks)"),
    ("{} LoRAs, the sentence held out too", "unseen_framed", " (sentence)"),
)
"""What a row is called, the runs that it is of, and what a loss there is marked with"""

REFERENCES = ("single", "base", "composite")
"""What is no merge."""

COLUMNS = {
    (NEW, "likeness"): "likeness",
    (NEW, "judge"): "attributes",
    (NEW, "scene"): "backgrounds",
    (NEW, "text"): "text alignment",
    ("no trigger", "likeness"): "nearness to the base without a trigger (CLIP)",
    ("no trigger", "pixels"): "nearness to the base without a trigger (pixels)",
    ("seen", "likeness"): "likeness on calibration prompts",
    ("seen", "judge"): "attributes on calibration prompts",
    ("seen", "text"): "text alignment on calibration prompts",
}
"""What is compared, by what the page calls it"""


def kept() -> dict[str, dict[int, Mapping[str, Any]]]:
    """Method → number of LoRAs → likeness kept, with its interval."""
    sizes = figures(RUNS)["sizes"]
    return {
        label: {int(n): of["rows"][name][NEW]["likeness kept"] for n, of in sizes.items()}
        for name, label in NAMES.items()
    }


def plot() -> list[str]:
    """The plot's place on the page."""
    most = max(next(iter(kept().values())))
    shown = ", ".join(f"{name} {of[most]['mean']:.0%}" for name, of in kept().items())
    text = "Likeness kept by the number of merged LoRAs, with 95 % intervals"
    return [f"![{text}: with {most}, {shown}.](images/{PLOT.name})"]


Cell = tuple[str, Mapping[str, Any]]
"""The best rival in a figure, and ours less the rival's"""

Row = tuple[str, list[Cell | None]]
"""What is compared, and a cell for each of :data:`MEASURES`"""


def verdicts() -> list[str]:
    """A row for each number of LoRAs and each regime."""
    found = [row for label, runs, _ in REGIMES for row in _by_size(label, runs)]
    for runs, kind, name, label in (
        ("unseen_styles", "styled", "judge", "a subject in a style: the subject"),
        ("unseen_styles", "styled", "style", "a subject in a style: the style"),
        ("unseen_styles", "subject", "judge", "a subject without the style"),
        ("unseen_pairs", "pair", "right", "two in one picture"),
        ("unseen_pairs", "halves", "right", "two in one picture, a prompt for each"),
    ):
        found.append((label, [None, _best(figures(runs)["sizes"]["2"], kind, name)]))
    return _corrected(found, tuple(MEASURES.values()))


def photographs() -> list[str]:
    """What ``frozen/photos.yaml`` names: three LoRAs or more, of several classes and of one."""
    several = _by_size("{} LoRAs of several classes", "unseen_photos_frozen")[1:]
    one = _by_size("{} LoRAs of one class", "unseen_photos_class_frozen")
    return _corrected([*several, *one], ("likeness", "recognised"))


def _by_size(label: str, runs: str) -> list[Row]:
    return [
        (label.format(size), [_best(of, NEW, name) for name in MEASURES])
        for size, of in figures(runs)["sizes"].items()
    ]


def _corrected(found: Sequence[Row], measures: Sequence[str]) -> list[str]:
    """The best rival in each figure and the differences; bold is what stays separated from 0 by
    Holm's correction over the table."""
    every = [cell for _, cells in found for cell in cells if cell]
    apart = separated([of for _, of in every])
    each = iter(apart)
    rows = [
        [
            label,
            " / ".join(dict.fromkeys(cell[0] for cell in cells if cell)),
            *(difference(cell[1], apart=next(each)) if cell else "" for cell in cells),
            "{concepts} × {trainings}".format_map([cell for cell in cells if cell][-1][1]),
        ]
        for label, cells in found
    ]
    heads = ("", "best rival", *measures, "concepts × trainings")
    return [
        *table(heads, rows, labels=2),
        "",
        f"Of {len(every)} differences, {sum(apart)} hold by Holm's correction over the table.",
    ]


def rivals(found: Mapping[str, Any]) -> list[str]:
    """The methods that are compared with ours; variants of ours are none."""
    return [r for r in found["against"] if r not in REFERENCES and not r.startswith("iteris")]


def _best(found: Mapping[str, Any], kind: str, name: str) -> Cell:
    best = max(rivals(found), key=lambda rival: found["rows"][rival][kind][name]["mean"])
    return label_of(best), found["against"][best][kind][name]


def label_of(method: str) -> str:
    head = method.partition(":")[0]
    return NAMES.get(method) or NAMES.get(head) or OTHERS.get(head, head)


def difference(of: Mapping[str, Any], *, apart: bool) -> str:
    """A verdict with the paired difference and the half width of its interval."""
    if of["interval"] is None:
        return lead(of)
    return f"**{of['verdict']}** ({lead(of)})" if apart else f"{of['verdict']} ({lead(of)})"


def below(of: Mapping[str, Any], *, less: bool) -> bool:
    """Whether the interval says that ours is worse, be it of one training."""
    return bool(of["interval"]) and (of["interval"][0] > 0 if less else of["interval"][1] < 0)


def behind() -> list[str]:
    """A line for each column in which the interval says so, with the rivals and their numbers."""
    lines: list[str] = []
    every = [
        (size + mark, of["against"])
        for _, runs, mark in REGIMES
        for size, of in figures(runs)["sizes"].items()
    ]
    for (kind, name), label in COLUMNS.items():
        found: dict[str, list[str]] = {}
        for at, against in every:
            for rival, kinds in against.items():
                of = kinds.get(kind, {}).get(name)
                if rival not in REFERENCES and of and below(of, less=name in LESS):
                    once = ", one training" if of["verdict"] == ONE_TRAINING else ""
                    by = short(f"{abs(of['mean']):.3f} at {at}{once}")
                    found.setdefault(label_of(rival), []).append(by)
        if found:
            rivals = ". ".join(
                f"{rival[0].upper()}{rival[1:]} by {', '.join(by)}" for rival, by in found.items()
            )
            lines.append(f"- **{label[0].upper()}{label[1:]}**: {rivals}.")
    sums = load("language.json")["sum"]
    ahead = [name for name in sums if sums[name] > sums["iteris"] and not name.startswith("iter")]
    shown = {"regmean": "RegMean", "ssr": "SSR-Merge", "linear": "the average"}
    rivals = ", ".join(f"{shown[name]} {sums[name]:.3f}" for name in shown if name in ahead)
    lines.append(
        f"- **Texts** (four emotion tasks, sum of macro F1): IterIS {sums['iteris']:.3f}, "
        f"`shrink=0.5` {sums['iteris-shrink']:.3f}; {rivals}."
    )
    return lines


TABLES = {"behind": behind, "photographs": photographs, "plot": plot, "verdicts": verdicts}
