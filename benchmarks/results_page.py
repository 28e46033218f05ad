"""``docs/results.md`` and its plot, from ``results/``.

``python benchmarks/results_page.py --write`` writes the page's figures and its plot, and
``--check`` fails where page or plot are not what the figures make.
"""

from __future__ import annotations

import argparse
import hashlib
import json

from markdown_tables import half_width
from outputs import ROOT
from tables import renew
from verdict_tables import PLOT, kept

COLORS = ("#c2410c", "#7c3aed", "#1d4ed8", "#737373", "#171717")


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


def stale(*, write: bool) -> list[str]:
    """What is not as the figures say."""
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
