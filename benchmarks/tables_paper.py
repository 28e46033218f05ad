"""The paper's own figures in ``docs/results.md`` (:mod:`results_page`), by :mod:`paper_figures`."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from markdown_tables import lines, load, short
from result_plots import Plot, curves

LEAST = 1e-9
"""What is drawn for nothing, where an axis is logarithmic."""


def section() -> str:
    """All parts that were measured."""
    data = load("paper_figures.json")
    found = [part(data[name]) for name, part in PARTS.items() if name in data]
    return "\n".join([_HEAD, *found])


_HEAD = """\
## The paper's own figures

On the pair 3, 5 of the toybox, which the suite does not report:
`python benchmarks/paper_figures.py`.
"""


def plots() -> list[Plot]:
    data = load("paper_figures.json")
    return [PLOTS[name](data[name]) for name in PLOTS if name in data]


def _discrepancy(data: dict[str, Any]) -> str:
    ends = {name: (min(v.values()), fmean(v.values()), max(v.values())) for name, v in data.items()}
    rows = [(name, *(f"{value:.1e}" for value in some)) for name, some in ends.items()]
    table = "\n".join(lines(("", "least", "mean", "most"), rows, right=3))
    return f"""\
### Figure 3a: inputs that a method takes for the merged model's

![Discrepancy by depth: RegMean's stays large, every solve of Algorithm 1 makes more of the first sites right, the sweep's is rounding.](images/results-paper-discrepancy.svg)

How far the inputs of a method's last solve are from those that the merged model sees, as a share of
these, over the sites of the denoiser by the length of the longest chain of sites up to them (text
encoder's included). RegMean takes each LoRA's own inputs. Algorithm 1 takes those of the merge before:
after k solves the sites of chains up to k are right, as appendix A.3 says. A sweep takes what the
merged model gives, but for rounding. Other than in the paper's figure RegMean's does not grow along the
whole model: it is there from the second site on.

{table}
"""  # noqa: E501


def _discrepancy_plot(data: dict[str, Any]) -> Plot:
    series = {n: {d: max(v, LEAST) for d, v in some.items()} for n, some in data.items()}
    labels = ("sites of the longest chain up to a site", "discrepancy")
    return curves("results-paper-discrepancy.svg", series, labels, logarithmic=True)


def _samples(data: dict[str, Any]) -> str:
    counts = list(next(iter(data.values())))
    rows = [
        (name, *(short(f"{some[count]['error']:.3f}") for count in counts))
        for name, some in data.items()
    ]
    seconds = [
        (f"{name}, seconds", *(f"{some[count]['seconds']:.1f}" for count in counts))
        for name, some in data.items()
    ]
    table = "\n".join(lines(("prompts", *counts), [*rows, *seconds], right=len(counts)))
    return f"""\
### Figure 3b: how many samples

![Held-out error by the number of prompts, of RegMean and IterIS.](images/results-paper-samples.svg)

Held-out error (0 is each LoRA itself, 1 the base) by the number of prompts at four timesteps, and the
seconds of one thread's CPU for the whole merge.

{table}
"""  # noqa: E501


def _samples_plot(data: dict[str, Any]) -> Plot:
    series = {
        name: {count: entry["error"] for count, entry in some.items()}
        for name, some in data.items()
    }
    return curves("results-paper-samples.svg", series, ("prompts a LoRA", "held-out error"))


def _terms(data: dict[str, Any]) -> str:
    rows = [(n, f"{some['mean']:.0%}", f"{some['most']:.0%}") for n, some in data.items()]
    table = "\n".join(lines(("", "mean over sites", "most"), rows, right=2))
    return f"""\
### Figure 3c: how even the objective's two terms are

The share of the larger of two terms, λ_i ‖X_i ΔW_iᵀ‖² with the LoRAs' changes and λ_i ‖X_i W_iᵀ‖²
with whole weights, of this pair and 8, 9; 50 % is even.

{table}
"""


def _bound(data: dict[str, Any]) -> str:
    moved = data["moved"]
    return f"""\
### Appendix A.3: how many iterations are enough

![How much the site that moves most moves in each iteration: it falls to rounding.](images/results-paper-bound.svg)

The longest chain of the {data["sites"]} sites, found by moving each site's output, says that Algorithm 1 is
at its fixed point after {data["iterations"]} iterations beyond the first solve. In the last of these the site
that moves most still moved by {moved[data["iterations"] - 1]:.1e} of its change; in the next, by
{moved[data["iterations"]]:.1e}. One sweep has the same result. `tests/benchmarks/test_iteration_bound.py` holds the bound
on random problems and on the toybox's text encoder.
"""  # noqa: E501


def _bound_plot(data: dict[str, Any]) -> Plot:
    moved = {str(n): max(value, LEAST) for n, value in enumerate(data["moved"], 1)}
    labels = ("iteration after the first solve", "largest change")
    return curves("results-paper-bound.svg", {"moved most": moved}, labels, logarithmic=True)


def _embedding(data: dict[str, Any]) -> str:
    rows = [(n, short(f"{v['image']:.3f}"), short(f"{v['judge']:.3f}")) for n, v in data.items()]
    table = "\n".join(lines(("", "image", "judge"), rows, right=2))
    return f"""\
### Textual inversion

The toybox's two concepts of pivotal tuning (`toy-a`, `toy-b`), twelve pictures each; the embeddings
were trained for 150 steps before the LoRA, and then with it.

{table}
"""


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "discrepancy": _discrepancy,
    "samples": _samples,
    "terms": _terms,
    "bound": _bound,
    "embedding": _embedding,
}
PLOTS: dict[str, Callable[[dict[str, Any]], Plot]] = {
    "discrepancy": _discrepancy_plot,
    "samples": _samples_plot,
    "bound": _bound_plot,
}
