"""Progress of a comparison of several methods, derived from each merge and drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..methods import find_method
from ..progress import OnProgress, Progress

BASE, ALONE, DRAWING = "base", "alone", "drawing"


class CompareProgress:
    """Converts progress of merges and drawings into that of the whole comparison. Remaining rows
    are expected to take as long as earlier ones, or as the current one."""

    def __init__(
        self, methods: Mapping[str, str], on_progress: OnProgress, title: str = ""
    ) -> None:
        self._methods, self._on_progress = methods, on_progress
        self._title = title and f"{title}: "
        self._took: dict[bool, dict[str, float]] = {True: {}, False: {}}
        """True while drawing → method → seconds."""

    def of(self, name: str) -> OnProgress:
        def on_progress(progress: Progress) -> None:
            drawing = progress.what == DRAWING
            left = progress.left
            if drawing and progress.done == progress.total:
                left = 0.0
            if left is not None:
                self._took[drawing][name] = progress.seconds + left
                left = self._whole(name, left, drawing)
            what = f"{self._title}{name}: {progress.what}"
            self._on_progress(replace(progress, what=what, left=left))

        return on_progress

    def _whole(self, name: str, left: float, drawing: bool) -> float | None:
        drawn, merged = self._took[True], [s for s in self._took[False].values() if s]
        later = list(self._methods.values())[list(self._methods).index(name) + 1 :]
        drawings = len(later) + (not drawing)
        merges = sum(other != BASE and find_method(other).needs_host for other in later)
        if (drawings and not drawn) or (merges and not merged):
            return None
        left += drawings * sum(drawn.values()) / max(len(drawn), 1)
        return left + merges * max(merged, default=0.0)
