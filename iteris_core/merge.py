"""``merge_loras``: several LoRAs in, one LoRA and a report out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from operator import sub
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from .calibration import Calibration
from .concepts import Concept
from .config import Unmergeable
from .errors import IterisError, brief
from .hosts.diffusers_lora import load_adapter
from .hosts.sample_store import SampleStore
from .lora import Lora
from .lora_files import Layout
from .lora_files.experts import rescued, write_or_keep
from .passes import changes as of_loras
from .passes.held_out import WHAT, kept
from .passes.job import Job, Merged
from .passes.report import MergeReport, SiteReport
from .prepare import Prepared, prepare
from .progress import OnProgress
from .report.provenance import join_embeddings, lacks_of, merge_metadata, notes_of
from .saving import interrupts_wait
from .settings import Budget, PresetName, Settings
from .solve.choose import THRESHOLDS, Thresholds
from .solve.problem import Solution

_LEAST_SHARE = -1.0
"""Below this, by how much worse than the base a merge is says nothing."""
_MOST_LOST = 0.1
"""The most that steps may take of what a LoRA keeps, the mean over its uses."""


@dataclass(frozen=True)
class MergeResult:
    lora: Lora
    report: MergeReport

    def save(
        self,
        path: str | Path,
        *,
        layout: Layout | None = None,
        dtype: str | torch.dtype = "float16",
        overwrite: bool = False,
    ) -> Path:
        """Write the merged LoRA to ``path`` in a ``layout``, or over it with ``overwrite``; see
        :func:`.lora_files.write_lora`. Values that do not fit in ``dtype`` are written as float32.
        If nothing can be written, the error says where the merge is instead, as float32. One for
        two experts becomes two files, ``<stem>_high_noise`` and ``<stem>_low_noise``; returns the
        first."""
        how: dict[str, Any] = {"layout": layout, "dtype": dtype, "overwrite": overwrite}
        return write_or_keep(self.lora, Path(path), **how)[0]

    def load_into(self, pipeline: Any, adapter_name: str = "iteris") -> None:
        """Load the merged LoRA into a diffusers pipeline, just like its file, as the only active
        adapter; an earlier one of that ``adapter_name`` is replaced.

        ``pipeline.unload_lora_weights()`` removes it. Embeddings that came with the LoRAs are not
        loaded; to use them, save the LoRA. Raises :class:`OutputError` if the pipeline cannot load
        all of it, which also says in which file the merge is.
        """
        try:
            load_adapter(pipeline, self.lora, adapter_name)
        except IterisError as error:
            raise rescued(self.lora, "merged.safetensors", error) from None


def merge_loras(
    host: Any,
    concepts: Sequence[Concept | str | Path],
    method: str = "iteris",
    *,
    preset: PresetName = "default",
    settings: Settings | Mapping[str, Any] | None = None,
    calibration: Calibration | Mapping[str, Any] | None = None,
    unmergeable: Unmergeable = "refuse",
    on_progress: OnProgress | None = None,
    memory_budget: Budget = "free",
    thresholds: Thresholds = THRESHOLDS,
    store: SampleStore | str | Path | None = None,
    rescue: Callable[[MergeResult], None] | None = None,
) -> MergeResult:
    """Merge the LoRAs of ``concepts`` into one.

    The base model is bit-identical afterwards, whatever happens.

    :param host: runs the base model: a diffusers pipeline, a transformers model, or a host such as
        ``DiffusersHost(pipeline, image=…)``; None for a method that looks at weights only.
    :param concepts: what to merge: each a :class:`Concept`, or a file with its trigger words in its
        metadata or in a note beside it. Those with strength or weight 0 are left out.
    :param method: a name from :func:`.methods.all_methods`.
    :param preset: a name from :data:`.settings.PRESETS`; ``settings`` and ``calibration`` override
        it.
    :param settings: the method's settings by name, or its dataclass, which replaces the preset's
        entirely.
    :param calibration: how to collect features: settings by name, or a whole :class:`Calibration`.
    :param unmergeable: what to do with sites whose features cannot be collected; a short pass finds
        them first. ``"refuse"`` the merge, ``"skip"`` the sites, or give them the ``"mean"`` of the
        LoRAs' changes. The report lists them.
    :param on_progress: called at every step with a :class:`.progress.Progress`. An exception raised
        in it cancels the merge.
    :param memory_budget: bytes that the merge may use beyond the model (``"free"``: what is free;
        None: no limit). It decides how many rows run at once and, if necessary, how many run at
        all. The report's plan shows this.
    :param thresholds: the thresholds for choosing a way of solving; experiments set others.
    :param store: a :class:`SampleStore`, or its folder, where denoised samples are kept for later
        merges, which then run the denoiser only for LoRAs that are new or changed. The result is
        the same.
    :param rescue: called with what there is if the user cancels during the ``steps``, while
        held-out rows are measured or afterwards; the exception goes on then. After Ctrl-C that is
        the merge with the steps taken so far, if held-out rows keep more with them. After any other
        cancellation, which is to take no time, it is the merge without them.
    :returns: the merged LoRA and a report on every site.
    :raises IterisError: for input that cannot be merged; :class:`SettingsError` for a setting out
        of range.
    """
    started = time.perf_counter()
    with ExitStack() as finished:
        with prepare(
            host,
            concepts,
            method,
            preset=preset,
            settings=settings,
            calibration=calibration,
            unmergeable=unmergeable,
            on_progress=on_progress,
            memory_budget=memory_budget,
            thresholds=thresholds,
            store=store,
            rescues=rescue is not None,
        ) as prepared:
            job = prepared.job
            with prepared.fit as fit:
                merged = fit.merge()
            if prepared.method.needs_host:
                merged, job.report.kept = _better(job, merged)
            pressed = finished.enter_context(interrupts_wait())
            result = _result(prepared, merged)
            if merged.stopped is None:  # otherwise it may be cancelled again
                job.eta.end()
        job.report.seconds = time.perf_counter() - started
        if rescue is not None and (merged.stopped is not None or pressed):
            rescue(result)
        if merged.stopped is not None:
            raise merged.stopped
    return result


def _result(prepared: Prepared, merged: Merged) -> MergeResult:
    """The merged LoRA beside those that are always on, and its report."""
    job, report = prepared.job, prepared.job.report
    active = [*prepared.merging, *prepared.always]
    changes = {site: solution.change for site, solution in merged.sites.items()}
    changes |= of_loras.means_of(job.concepts, prepared.others)
    changes = of_loras.beside(changes, of_loras.changes_always(job.included))
    embeddings, new_names, renamed = join_embeddings(active)
    where = {"include": "part of the merged LoRA", "outside": "load it beside the merged LoRA"}
    for concept in prepared.always:
        why = "" if concept.phrases else "no trigger word, so it acts on every prompt: "
        note = f"{why}on while the others were merged; {where[concept.always_on]}"
        report.note(concept.name, note)
    report.note("embeddings", *renamed)
    of_merge, report.notes = report.notes, notes_of(active)
    for name, notes in of_merge.items():
        report.note(name, *notes)
    repairs = merged.sites.keys() - job.changes.keys()
    for site, change in changes.items():
        solution = replace(merged.sites.get(site, Solution(change)), change=change)
        report.sites[site] = SiteReport.of(solution, len(prepared.merging), repair=site in repairs)
    report.settings |= merged.ran
    report.partial = merged.partial
    report.lacks = lacks_of(active)
    bases = (concept.lora.base for concept in active if concept.lora is not None)
    lora = Lora(
        changes,
        "merged",
        merge_metadata(active, report, embeddings, new_names),
        base=next((base for base in bases if base is not None), None),
        embeddings=embeddings,
    )
    return MergeResult(lora, report)


def _better(job: Job, merged: Merged) -> tuple[Merged, dict[str, list[float]]]:
    """``merged`` or, if held-out rows keep more with it, what it was before its steps; and what
    they keep. That is the mean over all LoRAs and uses, in which a share has a lower bound. Steps
    that cost a LoRA much are left out, whatever the others gain."""
    stopped, before = merged.stopped, merged.before
    versions = [merged] if before is None else [merged, before]
    if stopped is not None and not (isinstance(stopped, KeyboardInterrupt) and before):
        return versions[-1], {}
    try:
        if stopped is not None:
            again = "Ctrl-C again leaves them out"
            job.tick(f"held-out rows show whether the steps so far are kept; {again}", 0, 0)
        shares = kept(job, *({s: of.change for s, of in v.sites.items()} for v in versions))
    except BaseException as error:  # the merge is done
        stops = isinstance(error, (KeyboardInterrupt, *job.host.interrupts))
        if cancelled := stops or job.eta.cancelled:
            if not job.rescues:
                raise
            whole = stopped is None and isinstance(error, KeyboardInterrupt)
            stopped = stopped or error.with_traceback(None)
            merged = replace(versions[0 if whole else -1], stopped=stopped)
        elif not isinstance(error, Exception):
            raise
        job.report.note(WHAT, f"not measured: {'stopped' if cancelled else brief(error)}")
        return merged, {}
    if len(versions) == 1 or not shares[0]:
        return merged, shares[0]
    after, plain = ([_mean(of) for of in zip(*uses.values(), strict=True)] for uses in shares)
    comparison = f"held-out rows keep {fmean(after):.3f} with them and {fmean(plain):.3f} without"
    names = [concept.name for concept in job.concepts if concept.lora is not None]
    lost, name = max(zip(map(sub, plain, after), names, strict=True))
    better = fmean(plain) <= fmean(after) and lost <= _MOST_LOST
    why = f", {lost:.3f} less of {name}" if lost > _MOST_LOST else ""
    note = f"{comparison}{why}, so they are {'kept' if better else 'left out'}"
    job.report.note("steps", note)
    return versions[not better], shares[not better]


def _mean(shares: Sequence[float]) -> float:
    return fmean(max(share, _LEAST_SHARE) for share in shares)
