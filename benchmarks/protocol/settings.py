"""The settings of rivals: chosen per method, regime and number of merged LoRAs, kept in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iteris_core.saving import atomically

from .plan import BETWEEN, OWN, uses_data


class Chosen:
    """What a search found; with more LoRAs than any search had, what it found with the most, and
    ``otherwise`` by method where none has been yet. Ours has its own always."""

    def __init__(self, file: Path, otherwise: Mapping[str, Mapping[str, Any]]) -> None:
        self.file, self._otherwise = file, otherwise
        self._found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def __call__(self, method: str, size: int, regime: str) -> Mapping[str, Any]:
        if method in OWN:
            return OWN[method]
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
    searched = BETWEEN[regime][1] if regime in BETWEEN else regime
    return searched if uses_data(method) else "default"
