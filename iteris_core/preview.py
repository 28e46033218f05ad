"""``preview_merge``: what a merge would do, without merging."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .concepts import Concept
from .errors import UsageError
from .prepare import prepare


@dataclass(frozen=True)
class Preview:
    """``plan`` has one line per part of the model, and one for its steps. ``denoised`` counts the
    one-row forwards for denoising samples beforehand. The whole merge, with both, takes about that
    many ``seconds`` (None: unknown). ``notes`` are those that its report will have, but for the
    steps, and ``outlook`` sums it up: time, rows left out, rank and size of the file."""

    plan: Sequence[str]
    denoised: int = 0
    seconds: float | None = None
    notes: Sequence[str] = ()
    outlook: str = ""

    def lines(self) -> list[str]:
        """The plan and the notes as lines of text."""
        lines = [f"Whole merge: {self.outlook}"] if self.outlook else []
        lines += [f"Plan: {line}" for line in self.plan]
        if self.denoised:
            lines.append(f"Samples are denoised first: {self.denoised} forwards of one row.")
        return [*lines, *self.notes]


def preview_merge(
    host: Any,
    concepts: Sequence[Concept | str | Path],
    method: str = "iteris",
    *,
    rescue: object = None,
    **how: Any,
) -> Preview:
    """The plan of a merge of ``concepts``: its rows, how it stays within its memory budget, and, of
    an image model, about how long it takes.

    Arguments are those of :func:`.merge.merge_loras`; ``rescue`` is never called. Nothing is
    denoised or solved; the text encoders and a few rows of noise run. Raises :class:`IterisError`
    if the merge would be refused.
    """
    with prepare(host, concepts, method, **how) as prepared:
        job = prepared.job
        if not prepared.method.needs_host:
            return Preview([f"{method} looks at weights only: no rows"])
        with prepared.fit as fit:
            passes = fit.passes
            if passes is None:
                raise UsageError(f"{method} does not plan its memory.")
            passes.plan()
        limited = [plan for plan in passes.plans if plan.budget < math.inf]
        return Preview(
            job.report.plan,
            job.denoised if any(plan.stage.spatial for plan in limited) else 0,
            job.eta.left(),
            [f"{name}: {note}" for name, notes in job.report.notes.items() for note in notes],
            job.report.outlook,
        )
