"""Figures of the tests of architectures, for ``benchmarks/results/architectures.json``.

``{"comfyui": {name: {"version", "alone", "rows", "file"}}, "diffusers": {…}, "kinds": {kind: {who
computes its change: largest error}}, "layouts": {layout: {base: {"error", "diffusers"}}}}``.
Nothing is written without ``WRITE_RESULTS=1``.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "architectures.json"


def record(application: str, name: str, version: str, **figures: float | str) -> None:
    """Put the figures of one class among those that are there, with the ``version`` of the
    application; numbers with two digits.

    ``alone``: how far the merge of one LoRA is from that LoRA in the application's own loader, as a
    share of what it changes in the picture. ``rows``: the largest relative difference of a site
    between merges with many and with few rows in a forward. ``file``: how far the picture with the
    saved file in the application's own loader is from that of the merge, as a share of its effect.
    ``left_out``: layers that are not merged, and why. ``drift``: where it is repaired.
    """
    if not os.environ.get("WRITE_RESULTS"):
        return
    found = _found()
    rounded = {k: v if isinstance(v, str) else float(f"{v:.2g}") for k, v in figures.items()}
    found.setdefault(application, {})[name] = {"version": version, **rounded}
    _write(found)


def drift_in(notes: Mapping[str, Sequence[str]]) -> str:
    """Where drift is repaired in the denoisers, by a report's ``notes``."""
    said = [note for note in notes.get("drift", ()) if not note.startswith("text_encoder")]
    return "; ".join(one.partition(" repaired ")[2].partition(", since")[0] for one in said)


_LARGEST: dict[tuple[str, str], float] = {}


def record_kind(kind: str, oracle: str, error: float) -> None:
    """Put how far the change of a ``kind`` of LoRA is from what ``oracle``, with its version, makes
    of the same file, as a share of it: the largest of all cases of a run."""
    if not os.environ.get("WRITE_RESULTS"):
        return
    _LARGEST[kind, oracle] = max(error, _LARGEST.get((kind, oracle), 0.0))
    found = _found()
    rows = found.setdefault("kinds", {}).setdefault(kind, {})
    for other in [o for o in rows if o.partition(" ")[0] == oracle.partition(" ")[0]]:
        del rows[other]
    rows[oracle] = float(f"{_LARGEST[kind, oracle]:.2g}")
    _write(found)


_MISREAD: dict[tuple[str, str], set[str]] = {}


def record_layout(layout: str, base: str, error: float, misread: str) -> None:
    """Put how far a picture with a file of that ``layout``, as we read it, is from that with the
    LoRA in the weights, and what diffusers' own loader does with it (empty: the same picture); both
    of all alphas of a run."""
    if not os.environ.get("WRITE_RESULTS"):
        return
    _LARGEST[layout, base] = max(error, _LARGEST.get((layout, base), 0.0))
    found = _found()
    said = _MISREAD.setdefault((layout, base), set())
    said.add(misread)
    found.setdefault("layouts", {}).setdefault(layout, {})[base] = {
        "error": float(f"{_LARGEST[layout, base]:.2g}"),
        "diffusers": "; ".join(sorted(said - {""})),
    }
    _write(found)


def _found() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def _write(found: dict[str, Any]) -> None:
    text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
