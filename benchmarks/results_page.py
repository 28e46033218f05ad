"""What ``docs/results.md`` says and its plot, from ``results/``: each verdict from an interval.

``python benchmarks/results_page.py --write`` writes the page's figures and its plot, and
``--check`` fails where page or plot are not what the figures make.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_tables import figures, half_width, lead, load, short, table
from outputs import ROOT
from page_tables import FRONT
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

COLORS = ("#c2410c", "#7c3aed", "#1d4ed8", "#737373", "#171717")

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


def digest() -> str:
    """Of the plot's figures; the plot's metadata have it, so that none is drawn to compare."""
    return hashlib.sha256(json.dumps(kept(), sort_keys=True).encode()).hexdigest()


def save_plot() -> None:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": PLOT.name}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        axes = figure.subplots()
        for number, (label, points) in enumerate(kept().items()):
            axes.errorbar(
                [size + 0.07 * (number - 2) for size in points],
                [of["mean"] for of in points.values()],
                yerr=[half_width(of) or 0.0 for of in points.values()],
                label=label,
                color=COLORS[number],
                marker="o",
                markersize=4,
                linewidth=1.4 if number else 2.4,
                elinewidth=0.9,
                capsize=2,
            )
        ours = next(iter(kept().values()))
        axes.set_xticks(list(ours), [f"{size}\n({of['sets']} sets)" for size, of in ours.items()])
        axes.set_ylim(-0.2, 1.1)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.axhline(1, color="black", linewidth=0.6, linestyle=":")
        axes.set(xlabel="LoRAs merged", ylabel="likeness kept")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        description = f"sha256 of the figures: {digest()}"
        figure.savefig(PLOT, metadata={"Date": None, "Description": description})


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


def stale(*, write: bool) -> list[str]:
    """What is not as the figures say."""
    from tables import renew

    old = renew((ROOT / "docs" / "results.md",), write=write)
    if not PLOT.is_file() or digest() not in PLOT.read_text(encoding="utf-8"):
        old.append(PLOT.name)
        if write:
            save_plot()
    return old


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    old = stale(write=asked.write)
    print("\n".join(old))
    raise SystemExit(bool(old) and asked.check)


if __name__ == "__main__":
    main()
