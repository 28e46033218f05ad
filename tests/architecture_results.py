"""Figures of the tests of architectures, for ``benchmarks/results/architectures.json``.

``{"comfyui": {name: {"alone", "rows", "file"}}, "diffusers": {…}, "versions": {…}}``. Nothing is
written without ``WRITE_RESULTS=1``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "architectures.json"


def record(application: str, name: str, version: str, **figures: float | str) -> None:
    """Put the figures of one class among those that are there; numbers with two digits.

    ``alone``: how far the merge of one LoRA is from that LoRA in the application's own loader, as a
    share of what it changes in the picture. ``rows``: the largest relative difference of a site
    between merges with many and with few rows in a forward. ``file``: how far the picture with the
    saved file in the application's own loader is from that of the merge, as a share of its effect.
    ``left_out``: layers that are not merged, and why.
    """
    if not os.environ.get("WRITE_RESULTS"):
        return
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    rounded = {k: v if isinstance(v, str) else float(f"{v:.2g}") for k, v in figures.items()}
    found.setdefault(application, {}).setdefault(name, {}).update(rounded)
    found.setdefault("versions", {})[application] = version
    text = json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False)
    FILE.write_text(text + "\n", encoding="utf-8")
