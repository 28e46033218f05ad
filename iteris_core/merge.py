"""``merge_loras``: several LoRAs in, one LoRA and a report out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast, get_args

import torch

from .activations.memory import is_out_of_memory
from .calibration_prompts import Composite
from .concepts import Calibration, Concept
from .config import Unmergeable, read_concepts
from .errors import IterisError, OutOfMemory, SettingsError, SiteError, brief
from .hosts.diffusers import host_of
from .hosts.diffusers_lora import load_adapter
from .hosts.learned import embedding_triggers
from .hosts.protocol import Host
from .hosts.rows import CLASSES
from .hosts.sample_store import SampleStore, digest
from .lora import Lora, SiteChanges
from .lora_files import Layout
from .lora_files.experts import rescued, write_or_keep
from .methods import Method, find_method
from .methods.fitting import notes_on, streams_of
from .methods.registry import Fit, settings_over
from .passes import changes as of_loras
from .passes import preflight
from .passes.held_out import WHAT, expect_held_out, kept
from .passes.job import Job, Merged, within_time
from .progress import Forecast, OnProgress
from .report.provenance import join_embeddings, lacks_of, merge_metadata, notes_of
from .report.report import MergeReport, SiteReport
from .settings import Budget, PresetName, Settings, budget_of
from .solve.choose import THRESHOLDS, Thresholds
from .solve.problem import Solution

_log = logging.getLogger(__name__)


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
            raise rescued(self.lora, "merged.safetensors", error) from error


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
    store: SampleStore | None = None,
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
    :param store: where denoised samples are kept for later merges, which then run the denoiser only
        for LoRAs that are new or changed. The result is the same.
    :param rescue: called with what there is if the user cancels during the ``steps`` or while
        held-out rows are measured; the exception goes on afterwards. After Ctrl-C that is the merge
        with the steps taken so far, if held-out rows keep more with them. After any other
        cancellation, which is to take no time, it is the merge without them.
    :returns: the merged LoRA and a report on every site.
    :raises IterisError: for input that cannot be merged; :class:`SettingsError` for a setting out
        of range.
    """
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
        result, stopped = prepared.run()
    if stopped is not None:
        if rescue is not None:
            rescue(result)
        raise stopped
    return result


@dataclass(frozen=True)
class Prepared:
    """A merge whose model was looked at, inside :func:`prepare`: its ``job``, ``fit`` (None: there
    is nothing to merge) and the ``others`` of its sites, which get the mean of the LoRAs. Of its
    concepts, ``merging`` are merged and ``always`` are on; ``wordless`` names those that are on
    because they have no words. ``calibration`` is as requested, and ``started`` when."""

    job: Job
    fit: Fit | None
    method: Method
    settings: Settings
    calibration: Calibration
    merging: Sequence[Concept]
    always: Sequence[Concept]
    wordless: Sequence[str]
    started: float
    others: Mapping[str, SiteChanges] = field(default_factory=dict[str, SiteChanges])

    def run(self) -> tuple[MergeResult, BaseException | None]:
        """The merge, and what the user stopped it by if it is to be rescued."""
        job, merged, fidelity = self.job, Merged({}), dict[str, list[float]]()
        if self.fit is not None:
            merged = self.fit.merge()
            if self.method.needs_host:
                merged, fidelity = _better(job, merged)
        means = of_loras.means_of(job.concepts, self.others)
        solved = {site: Solution(change) for site, change in means.items()}
        merged = replace(merged, sites={**merged.sites, **solved})
        seconds = time.perf_counter() - self.started
        if merged.stopped is None:  # otherwise it may be cancelled again
            job.eta.end()
        active = [*self.merging, *self.always]
        changes = {site: solution.change for site, solution in merged.sites.items()}
        changes = of_loras.beside(changes, of_loras.changes_always(job.included))
        embeddings, new_names, renamed = join_embeddings(active)
        notes = notes_of(active)
        for name, more in (*job.notes, *self._always_notes(), ("embeddings", renamed)):
            if more:
                notes.setdefault(name, []).extend(more)
        calibration = self.calibration
        if self.fit is not None:  # the time allowed may have left fewer samples
            calibration = replace(calibration, samples=job.calibration.samples, minutes=None)
        report = MergeReport(
            method=self.method.name,
            concepts=[concept.name for concept in self.merging],
            sites={
                site: SiteReport.of(
                    replace(merged.sites.get(site, Solution(change)), change=change),
                    len(self.merging),
                    repair=site in merged.repairs,
                )
                for site, change in changes.items()
            },
            seconds=seconds,
            settings={**asdict(self.settings), **merged.ran},
            calibration=asdict(calibration) if self.method.needs_host else {},
            notes=notes,
            rows=merged.rows,
            plan=list(merged.plan),
            outlook=merged.outlook,
            short=list(merged.short),
            convergence=list(merged.convergence),
            preserved=[concept.name for concept in self.merging if concept.lora is None],
            lacks=lacks_of(active),
            kept=fidelity,
            wordless=list(self.wordless),
        )
        bases = (concept.lora.base for concept in active if concept.lora is not None)
        lora = Lora(
            changes,
            "merged",
            merge_metadata(active, report, embeddings, new_names),
            base=next((base for base in bases if base is not None), None),
            embeddings=embeddings,
        )
        return MergeResult(lora, report), merged.stopped

    def _always_notes(self) -> Iterator[tuple[str, list[str]]]:
        where = {"include": "part of the merged LoRA", "outside": "load it beside the merged LoRA"}
        for concept in self.always if self.fit is not None else ():
            why = "" if concept.phrases else "no trigger word, so it acts on every prompt: "
            note = f"{why}on while the others were merged; {where[concept.always_on]}"
            yield concept.name, [note]


@contextmanager
def prepare(
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
    store: SampleStore | None = None,
    rescues: bool = False,
) -> Generator[Prepared]:
    """Context in which a merge can be planned or run, with arguments as of :func:`merge_loras`:
    reads what it is given, looks at the model with a few rows of noise, and finds the changes, the
    concepts and the number of samples. The LoRAs that are always on act until it ends.
    """
    started = time.perf_counter()
    chosen = find_method(method)
    if chosen.needs_host and host is None:
        raise SettingsError(f"Method {method!r} runs the base model; pass a host.")
    settings, calibration = settings_over(preset, method, settings, calibration)
    if unmergeable not in get_args(Unmergeable):
        known = ", ".join(get_args(Unmergeable))
        raise SettingsError(f"unmergeable must be one of {known}, not {unmergeable!r}.")
    memory_budget = budget_of(memory_budget)
    host = None if host is None else host_of(host)
    concepts = given = read_concepts(host, concepts)
    pictures = host is not None and host.pictures
    if chosen.needs_host and pictures:
        concepts = of_loras.with_wordless_on(given)
    active = [concept for concept in concepts if concept.is_active]
    wordless = [one.name for one in active if not any(one is other for other in given)]
    always, merging = of_loras.always_on(active), of_loras.always_on(active, "no")
    loras = sum(concept.lora is not None for concept in merging)
    settled = calibration.settled(loras, pictures=pictures)
    eta = Forecast(on_progress)
    job = Job(
        cast(Host, host),
        merging,
        {},
        settled,
        torch.Generator().manual_seed(settled.seed),
        eta.tick,
        memory_budget=memory_budget,
        thresholds=thresholds,
        eta=eta,
        store=store,
        rank=getattr(settings, "rank", None),
        included=of_loras.always_on(always, "include"),
        rescues=rescues,
    )
    zero = "left out of the merge: its strength or weight is 0"
    job.notes.extend((concept.name, [zero]) for concept in concepts if not concept.is_active)
    given = chosen, settings, calibration
    if always and not loras:  # as they are, side by side
        yield Prepared(job, None, *given, merging, always, wordless, started)
    elif host is None or not chosen.needs_host:  # weights make no use of prompts
        merging = [concept for concept in merging if concept.lora is not None]
        job = replace(job, concepts=merging, changes=of_loras.changes_of(merging))
        with chosen.prepare(job, settings) as fit:
            yield Prepared(job, fit, *given, merging, always, wordless, started)
    else:
        try:
            with of_loras.added(host, of_loras.changes_always(always)):
                job, others = _looked_at(job, always, chosen, settings, unmergeable)
                with _with_embeddings(job), chosen.prepare(job, settings) as fit:
                    yield Prepared(job, fit, *given, merging, always, wordless, started, others)
        except Exception as error:  # where nothing can be tried with less
            if isinstance(error, IterisError) or not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"Out of memory at the step {eta.what!r} ({brief(error)}). Lower latent_size, or "
                "free memory elsewhere. The model is unchanged."
            ) from error


def _looked_at(
    job: Job,
    always: Sequence[Concept],
    method: Method,
    settings: Settings,
    unmergeable: Unmergeable,
) -> tuple[Job, Mapping[str, SiteChanges]]:
    """The job as it is to run, and the changes of sites that get the mean; adds to its notes.

    The job gets its model's trace, as many samples as its time allows, the concepts that its host
    adds and ``method`` supports, and the changes of the sites whose features can be collected. The
    concepts ``always`` are on already. Raises :class:`SiteError` if there are other sites and
    ``unmergeable`` is ``"refuse"``, or if there are no others.
    """
    concepts, wanted = job.concepts, job.calibration.samples

    def with_added(job: Job) -> Job:
        added = job.host.added(concepts, job.calibration)
        every = [*concepts, *(a for a in added if method.sums or not isinstance(a, Composite))]
        return replace(job, concepts=every, changes=of_loras.changes_of(every))

    if job.store is not None:
        on = sorted(of_loras.changes_always(always).items())
        job = replace(job, store=job.store.within(digest([(s, c.up, c.down) for s, c in on])))
    job = with_added(job)
    of_loras.check_sites(job.host, job.changes)
    sweeps = method.sweeps(settings)
    trace = preflight.unmergeable_sites(job, sweep=sweeps > 0)
    conditions = job.calibration.conditions
    if not sweeps:  # a fit to reference rows alone learns nothing from them
        conditions = 0.0
    elif conditions is None:
        conditions = job.thresholds.conditions
    calibration, refused = replace(job.calibration, conditions=conditions), trace.refused
    if (refused and unmergeable == "refuse") or job.changes.keys() <= refused.keys():
        raise SiteError(preflight.complaint(refused, concepts))
    job = replace(job, calibration=calibration, trace=trace)
    for seen in trace.stages:
        job.eta.did(seen.products, seen.seconds)
    job = within_time(job, max(sweeps, 1))
    expect_held_out(job)
    few = job.calibration.samples
    if few < wanted:
        job = with_added(job)
    for concept in job.concepts[len(concepts) :]:
        job.notes.append((concept.name, [_added_note(concept, concepts, always)]))
    if few < wanted:
        minutes = job.calibration.minutes
        note = f"{few} of {wanted} prompts per concept, for a merge of about {minutes:g} min"
        job.tick(f"plan: {note}", 0, 0, note)
        job.notes.append(("samples", [note]))
    if refused:
        what = "get the mean of the LoRAs" if unmergeable == "mean" else "are LEFT OUT"
        note = f"{preflight.complaint(refused, concepts, refused=False)}; they {what}"
        job.notes.append(("sites", [note]))
    means = {site: job.changes[site] for site in refused if unmergeable == "mean"}
    changes = {site: change for site, change in job.changes.items() if site not in refused}
    job = replace(job, changes=changes)
    if job.host.pictures and len(job.concepts) > 1 and getattr(settings, "repair", False):
        job.notes.append(("drift", notes_on(streams_of(job), changes)))
    return job, means


@contextmanager
def _with_embeddings(job: Job) -> Generator[None]:
    """Context in which the embeddings of the concepts' triggers are active; notes which."""
    calls = [embedding_triggers(concept) for concept in job.concepts]
    with job.host.activate(calls) as in_force:
        for concept, triggers, names in zip(job.concepts, calls, in_force, strict=True):
            warnings = triggers.warnings(names)
            active = [f"its embedding {name} is active" for name in sorted(names)]
            job.notes.append((concept.name, [*active, *warnings]))
            for warning in warnings:
                _log.warning("%s: %s", concept.name, warning)
        yield


def _better(job: Job, merged: Merged) -> tuple[Merged, dict[str, list[float]]]:
    """``merged`` or, if held-out rows keep more with it, what it was before its steps; and what
    they keep. That is the mean over all LoRAs and uses."""
    stopped = merged.stopped
    versions = [merged, merged.without_steps] if merged.before else [merged]
    if stopped is not None and not (isinstance(stopped, KeyboardInterrupt) and merged.before):
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
        job.notes.append((WHAT, [f"not measured: {'stopped' if cancelled else brief(error)}"]))
        return merged, {}
    if len(versions) == 1 or not shares[0]:
        return merged, shares[0]
    after, before = (fmean(share for use in of.values() for share in use) for of in shares)
    told = f"held-out rows keep {after:.3f} with them and {before:.3f} without"
    better = before <= after
    job.notes.append(("steps", [f"{told}, so they are {'kept' if better else 'left out'}"]))
    return versions[not better], shares[not better]


def _added_note(added: Concept, concepts: Sequence[Concept], always: Sequence[Concept]) -> str:
    count, weight = len(set(added.prompts or ())), f"at weight {added.weight:g}"
    if isinstance(added, Composite):
        return f"{count} prompts that name both get the sum of both LoRAs, {weight}"
    base = ", ".join(["the base", *(concept.name for concept in always)])
    if added.trigger == CLASSES:
        return f"{count} prompts with a class word and no trigger ask for {base} alone, {weight}"
    note = f"{count} prompts that name no concept ask for {base} alone, {weight}"
    wordless = [one.name for one in concepts if one.lora is not None and not one.phrases]
    if not wordless:
        return note
    return (
        f"{note}. {', '.join(wordless)} has no trigger word, so a part of it may reach them; if it "
        "should act on every prompt, mark it as always on (always_on=include)"
    )
