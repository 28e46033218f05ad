"""The methods of the language and the caption tables, with the settings that their authors give."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("average", {}),
    "task-arithmetic": ("task-arithmetic", {"scale": 0.4}),
    "ties": ("ties", {"density": 0.2, "scale": 1.0}),
    "dare": ("dare-linear", {"density": 0.5, "scale": 0.4}),
    "regmean": ("regmean", {"shrink": 0.9}),
    "ssr": ("ssr", {}),
    "iteris": ("iteris", {}),
}
"""Name in a table → method and settings. Task arithmetic and TIES by their papers' advice for data
that nobody tuned on; DARE on top of task arithmetic."""
