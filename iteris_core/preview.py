"""``preview_merge``: what a merge would do, without merging."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from .concepts import Calibration, Concept
from .config import Unmergeable
from .errors import UsageError
from .hosts.learned import embedding_triggers
from .hosts.protocol import Host
from .merge import begun, prepared
from .methods import find_method
from .methods.registry import settings_over
from .passes.changes import changes_of, switched_on
from .passes.planner import Planned
from .progress import OnProgress
from .settings import PresetName
from .solve.choose import THRESHOLDS, Thresholds


@dataclass(frozen=True)
class Preview:
    """``plan`` has one line per part of the model. ``denoised`` counts the one-row forwards for
    denoising samples beforehand. The whole merge takes about that many ``seconds`` (None: unknown),
    denoising and polish included. ``notes`` are those that its report will have, and ``outlook``
    sums it up: time, rows left out, rank and size of the file."""

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
    host: Host | None,
    concepts: Sequence[Concept],
    method: str = "iteris",
    *,
    preset: PresetName = "default",
    settings: Mapping[str, Any] | None = None,
    calibration: Calibration | Mapping[str, Any] | None = None,
    unmergeable: Unmergeable = "refuse",
    on_progress: OnProgress | None = None,
    memory_budget: int | Literal["free"] | None = "free",
    thresholds: Thresholds = THRESHOLDS,
) -> Preview:
    """The plan of a merge of ``concepts``: its rows, how it stays within its memory budget, and, of
    an image model, about how long it takes.

    Arguments are those of :func:`.merge.merge_loras`. Nothing is denoised or solved; the text
    encoders and a few rows of noise run. Raises :class:`IterisError` if the merge would be refused.
    """
    chosen = find_method(method)
    chosen_settings, calibration = settings_over(preset, method, settings, calibration)
    job, always = begun(host, concepts, chosen, calibration, on_progress, memory_budget, thresholds)
    if always and not job.concepts:
        return Preview(["every LoRA is always on: their sum, without rows"])
    if not chosen.needs_host:
        changes_of(job.concepts)  # raises if there is nothing to merge
        return Preview([f"{method} looks at weights only: no rows"])
    if host is None:
        raise UsageError(f"Method {method!r} runs the base model; pass a host.")
    with switched_on(host, always):
        job, _, noted = prepared(job, always, chosen, chosen_settings, unmergeable)
        triggers = [embedding_triggers(concept) for concept in job.concepts]
        try:
            with host.activate(triggers):
                chosen.merge(replace(job, only_plans=True), chosen_settings)
        except Planned as planned:
            made = [plan for plan in planned.plans if plan.budget < math.inf]
            return Preview(
                [str(plan) for plan in made],
                job.denoised if any(plan.stage.spatial for plan in made) else 0,
                job.eta.left(),
                [f"{name}: {note}" for name, notes in noted for note in notes],
                planned.outlook,
            )
    raise UsageError(f"{method} does not plan its memory.")
