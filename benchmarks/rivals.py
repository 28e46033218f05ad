"""Methods of the language and the caption tables: settings as published, the same in both."""

from __future__ import annotations

from typing import Any

Methods = dict[str, tuple[str, dict[str, Any]]]
"""Name in a table → method and settings"""

RIVALS: Methods = {
    "linear": ("average", {}),
    "task-arithmetic": ("task-arithmetic", {"scale": 0.4}),
    "ties": ("ties", {"density": 0.2, "scale": 1.0}),
    "dare": ("dare-linear", {"density": 0.5, "scale": 0.4}),
    "regmean": ("regmean", {"shrink": 0.9}),
    "ssr": ("ssr", {}),
}
"""Task arithmetic and TIES by their papers' advice for data that nobody tuned on; DARE on top of
task arithmetic."""


def methods(iterations: int, ridge: float) -> Methods:
    """The rivals, our defaults, and Algorithm 1 with the paper's iterations and α of that task."""
    paper = {
        "align": "adapter",
        "schedule": "jacobi",
        "iterations": iterations,
        "balance": "adapter",
        "ridge": ridge,
    }
    return {**RIVALS, "iteris": ("iteris", {}), "iteris-paper": ("iteris", paper)}
