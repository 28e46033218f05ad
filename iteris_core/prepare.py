"""``prepare``: what a merge reads, finds out of its model, and plans, before it runs."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import torch

from .activations.memory import is_out_of_memory
from .calibration import Calibration
from .calibration_prompts import Composite
from .concepts import Concept
from .config import Unmergeable, read_concepts, ready_to_merge
from .errors import IterisError, OutOfMemory, SettingsError, SiteError, brief
from .hosts.diffusers import host_of
from .hosts.learned import embedding_triggers
from .hosts.protocol import Host
from .hosts.rows import CLASSES
from .hosts.sample_store import SampleStore, digest
from .lora import SiteChanges
from .methods import Method, find_method
from .methods.fitting import notes_on, streams_of
from .methods.registry import Fit, settings_over
from .passes import changes as of_loras
from .passes import preflight
from .passes.held_out import WHAT as HELD_OUT
from .passes.held_out import held_out_work
from .passes.job import Job
from .passes.report import MergeReport
from .passes.time_limit import within_time
from .progress import Forecast, OnProgress
from .settings import Budget, PresetName, Settings, budget_of
from .solve.choose import THRESHOLDS, Thresholds

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A merge whose model was looked at, inside :func:`prepare`: its ``job``, the context of its
    ``fit``, and the ``others`` of its sites, which get the mean of the LoRAs. Of its concepts,
    ``merging`` are merged and ``always`` are on."""

    job: Job
    fit: AbstractContextManager[Fit]
    method: Method
    merging: Sequence[Concept]
    always: Sequence[Concept]
    others: Mapping[str, SiteChanges] = field(default_factory=dict[str, SiteChanges])


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
    store: SampleStore | str | Path | None = None,
    rescues: bool = False,
) -> Generator[Prepared]:
    """Context in which a merge can be planned or run, with arguments as of :func:`merge_loras`:
    reads what it is given, looks at the model with a few rows of noise, and finds the changes, the
    concepts and the number of samples. The LoRAs that are always on act until it ends.
    """
    chosen = find_method(method)
    if chosen.needs_host and host is None:
        raise SettingsError(f"Method {method!r} runs the base model; pass a host.")
    settings, calibration = settings_over(preset, method, settings, calibration)
    if unmergeable not in get_args(Unmergeable):
        known = ", ".join(get_args(Unmergeable))
        raise SettingsError(f"unmergeable must be one of {known}, not {unmergeable!r}.")
    memory_budget = budget_of(memory_budget)
    host = None if host is None else host_of(host)
    pictures = host is not None and host.pictures
    read = read_concepts(host, concepts)
    concepts = ready_to_merge(read, by_features=chosen.needs_host, pictures=pictures)
    active = [concept for concept in concepts if concept.is_active]
    merging = [concept for concept in active if concept.always_on == "no"]
    always = [concept for concept in active if concept.always_on != "no"]
    if not chosen.needs_host:  # weights make no use of prompts
        merging = [concept for concept in merging if concept.lora is not None]
        if not merging:
            merging = [concept for concept in always if concept.always_on == "include"]
            always = [concept for concept in always if concept.always_on == "outside"]
    loras = sum(concept.lora is not None for concept in merging)
    steps = getattr(settings, "steps", 0)
    if steps is None:
        steps = thresholds.steps_for(loras) if pictures else 0
    settled = calibration.settled(loras, pictures=pictures)
    eta = Forecast(on_progress)
    report = MergeReport(
        chosen.name,
        [concept.name for concept in merging],
        settings=asdict(settings),
        calibration=asdict(calibration) if chosen.needs_host else {},
        preserved=[concept.name for concept in merging if concept.lora is None],
    )
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
        store=None if store is None else SampleStore.at(store),
        rank=getattr(settings, "rank", None),
        share_ranks=getattr(settings, "share_ranks", False),
        steps=steps,
        included=[concept for concept in always if concept.always_on == "include"],
        rescues=rescues,
        report=report,
    )
    for concept in concepts:
        if not concept.is_active:
            report.note(concept.name, "left out of the merge: its strength or weight is 0")
    if host is None or not chosen.needs_host:
        job = replace(job, changes=of_loras.changes_of(merging))
        fit = chosen.prepare(job, settings)
        yield Prepared(job, fit, chosen, merging, always)
    else:
        try:
            with of_loras.added(host, of_loras.changes_always(always)):
                job, others = _looked_at(job, always, chosen, settings, unmergeable)
                samples = job.calibration.samples  # the time allowed may have left fewer
                report.calibration = asdict(replace(calibration, samples=samples, minutes=None))
                with _with_embeddings(job):
                    fit = chosen.prepare(job, settings)
                    yield Prepared(job, fit, chosen, merging, always, others)
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
    concepts, wanted, steps = job.concepts, job.calibration.samples, job.steps

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
    if job.calibration.minutes is not None:
        job = within_time(job, max(sweeps, 1))
    if "steps" in job.report.settings:
        job.report.settings["steps"] = job.steps
    job.eta.expect(HELD_OUT, held_out_work(job))
    few = job.calibration.samples
    if few < wanted:
        job = with_added(job)
    for concept in job.concepts[len(concepts) :]:
        job.report.note(concept.name, _added_note(concept, concepts, always))
    if few < wanted or job.steps < steps:
        minutes = job.calibration.minutes
        counts = [f"{few} of {wanted} prompts per concept"]
        counts += [f"{job.steps} of {steps} steps"] if steps else []
        note = f"{' and '.join(counts)}, for a merge of about {minutes:g} min"
        job.tick(f"plan: {note}", 0, 0, note)
        job.report.note("samples", note)
    if refused:
        what = "get the mean of the LoRAs" if unmergeable == "mean" else "are LEFT OUT"
        note = f"{preflight.complaint(refused, concepts, refused=False)}; they {what}"
        job.report.note("sites", note)
    means = {site: job.changes[site] for site in refused if unmergeable == "mean"}
    changes = {site: change for site, change in job.changes.items() if site not in refused}
    job = replace(job, changes=changes)
    if job.host.pictures and len(job.concepts) > 1 and getattr(settings, "repair", False):
        job.report.note("drift", *notes_on(streams_of(job), changes))
    return job, means


@contextmanager
def _with_embeddings(job: Job) -> Generator[None]:
    """Context in which the embeddings of the concepts' triggers are active; notes which."""
    calls = [embedding_triggers(concept) for concept in job.concepts]
    with job.host.activate(calls) as in_force:
        for concept, triggers, names in zip(job.concepts, calls, in_force, strict=True):
            warnings = triggers.warnings(names)
            active = [f"its embedding {name} is active" for name in sorted(names)]
            job.report.note(concept.name, *active, *warnings)
            for warning in warnings:
                _log.warning("%s: %s", concept.name, warning)
        yield


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
