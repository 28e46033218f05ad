"""The settings of rivals: chosen per method, regime and number of merged LoRAs, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iteris_core.saving import atomically

from .plan import uses_data

ON_TWO_PAIRS: Mapping[str, Mapping[str, Any]] = {
    "task-arithmetic": {"scale": 0.7},
    "ties": {"density": 0.8, "scale": 1.0},
    "dare-linear": {"density": 0.8, "scale": 0.4},
    "dare-ties": {"density": 0.5, "scale": 0.6},
    "knots": {"density": 0.3, "scale": 0.7},
    "orthogonal": {"softness": 0.0, "scale": 0.5},
    "regmean": {"shrink": 1.0},
    "regmean++": {"shrink": 1.0},
    "ssr": {"ridge": 1e-2},
    "custom-diffusion": {"ridge": 1e-8},
    "iteris-subspace": {"ridge": 1e-5},
}
"""The best of grids on two pairs of the toybox that nothing reports, on calibration prompts."""


class Chosen:
    """What a search found; with more LoRAs than any search had, what it found with the most, and
    ``otherwise`` by method where there was no search."""

    def __init__(self, file: Path, otherwise: Mapping[str, Mapping[str, Any]]) -> None:
        self.file, self._otherwise = file, otherwise
        self._found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, method: str, size: int, regime: str) -> Mapping[str, Any]:
        found = self._found.get(method, {}).get(_of(method, regime), {})
        most = max(map(int, found), default=size)
        return found.get(str(min(size, most)), self._otherwise.get(method, {}))

    def known(self, method: str, size: int, regime: str) -> bool:
        """Whether a search found them."""
        return str(size) in self._found.get(method, {}).get(_of(method, regime), {})

    def keep(self, method: str, size: int, regime: str, settings: Mapping[str, Any]) -> None:
        self._found.setdefault(method, {}).setdefault(_of(method, regime), {})[str(size)] = settings
        with atomically(self.file) as path:
            path.write_text(json.dumps(self._found, indent=1) + "\n")


def _of(method: str, regime: str) -> str:
    """A method that only looks at weights has one result, whatever the regime."""
    return regime if uses_data(method) else "default"
