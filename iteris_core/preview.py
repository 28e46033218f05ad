"""``preview_merge``: what a merge would do, without merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .concepts import Calibration, Concept
from .errors import UsageError
from .hosts.learned import embedding_triggers
from .hosts.protocol import Host
from .lora import SiteChanges
from .merge import Runtime, begun, prepared
from .methods import Method, find_method
from .methods.registry import settings_over
from .passes import preflight
from .passes.changes import changes_of, switched_on
from .passes.job import Job
from .presets import PresetName
from .progress import OnProgress
from .settings import Settings
from .solve.choose import POLICY, Policy


class _Planned(Exception):
    """Raised when a stage has its plan, to stop it there."""


@dataclass(frozen=True)
class Preview:
    """``plan`` has one line per part of the model. ``unmergeable`` maps sites to the reason why
    their features cannot be collected; ``complaint`` summarises this in words. ``denoised`` counts
    the one-row forwards for denoising samples beforehand."""

    plan: Sequence[str]
    unmergeable: Mapping[str, str]
    complaint: str
    denoised: int

    def lines(self) -> list[str]:
        """The complaint and the plan as lines of text."""
        lines = [f"Cannot be merged by features: {self.complaint}."] if self.complaint else []
        lines += [f"Plan: {line}" for line in self.plan]
        if self.denoised:
            lines.append(f"Samples are denoised first: {self.denoised} forwards of one row.")
        return lines


def preview_merge(
    host: Host | None,
    concepts: Sequence[Concept],
    method: str = "iteris",
    *,
    preset: PresetName = "default",
    settings: Mapping[str, Any] | None = None,
    calibration: Calibration | Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
    memory_budget: int | Literal["free"] | None = "free",
    policy: Policy = POLICY,
) -> Preview:
    """Report which sites a merge of ``concepts`` could not handle, and how it would stay within its
    memory budget.

    Arguments are those of :func:`.merge.merge_loras`. Nothing is denoised or solved; a row or two
    run through the model. Raises :class:`IterisError` if the merge could not start.
    """
    chosen = find_method(method)
    chosen_settings, calibration = settings_over(preset, method, settings, calibration)
    runtime = Runtime(policy=policy)
    job, always = begun(host, concepts, calibration, on_progress, memory_budget, runtime)
    if not chosen.needs_host:
        changes_of(job.concepts)  # raises if there is nothing to merge
        return Preview([f"{method} looks at weights only: no rows"], {}, "", 0)
    if host is None:
        raise UsageError(f"Method {method!r} runs the base model; pass a host.")
    with switched_on(host, always):
        return _preview(job, chosen, chosen_settings)


def _preview(job: Job, method: Method, settings: Settings) -> Preview:
    """The same for a job that has only its concepts so far."""
    job, found, _ = prepared(job, method, settings)
    host, calibration, concepts, kept = job.host, job.calibration, job.concepts, job.changes
    plan: list[str] = []
    calls = [embedding_triggers(concept, host.learned) for concept in concepts]

    def until_planned(what: str, done: int, total: int, line: str = "") -> None:
        job.tick(what, done, total, line)
        if line:
            plan.append(line)
            raise _Planned

    with host.activate(calls):
        for part in _parts(kept):
            planned = replace(
                job,
                changes=part,
                calibration=replace(calibration, latents="noise"),
                generator=torch.Generator().manual_seed(calibration.seed),
                tick=until_planned,
            )
            try:
                method.merge(planned, settings)
            except _Planned:
                continue
            raise UsageError(f"{method.name} does not plan its memory.")
    denoised = job.denoised if any(_denoises(site) for site in kept) else 0
    complaint = preflight.complaint(found, concepts, refused=False) if found else ""
    return Preview(plan, found, complaint, denoised)


def _parts(changes: Mapping[str, SiteChanges]) -> list[dict[str, SiteChanges]]:
    """The changes, split by part of the model: a stage is planned before it runs, and the next one
    can be planned only if it does not depend on that run."""
    parts: dict[str, dict[str, SiteChanges]] = {}
    for site, some in changes.items():
        parts.setdefault(site.partition(".")[0], {})[site] = some
    return [parts[name] for name in sorted(parts, key=_denoises)]


def _denoises(site: str) -> bool:
    return not site.startswith("text_encoder")
