"""A short pass before a merge: finds sites that no forward reaches, and sites that mix rows.

Every stage runs a row or two of pure noise, with no LoRA active. A layer may get the tokens of all
rows as one row, or every frame of a video as a separate row. Such a site is merged like any other
if each row's tokens stay together, in the order of the rows; running two rows together and
separately checks this.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..activations.lockstep import Lockstep
from ..activations.memory import is_apart, wait_for
from ..activations.streams import Stream, find_streams
from ..activations.trace import hooked
from ..architectures.sites import weight_energy, weight_shape
from ..concepts import Concept
from ..hosts.protocol import SampleRequest, Stage
from ..hosts.recorded import differ
from ..linalg import on_host
from .footprint import Step, forward_of
from .job import Job, StageTiming, Trace

UNREACHED = "is not used by this base"
PARTLY = 'is used with some of the prompts only, which schedule="jacobi" of iteris takes'
MIXED = "gets the rows of a batch mixed or split"
REPEATED = 'is called more than once in a forward, which schedule="jacobi" of iteris takes'
_PAIRS = 4
_TIMED = 8  # rows
_NUMBERS = 8  # numbers that represent a token
_ROUNDING = 1e-3


def unmergeable_sites(job: Job, *, sweep: bool) -> Trace:
    """Why sites of the job's changes cannot be merged, by a ``sweep`` or otherwise. A separate
    generator keeps the merge's random draws independent of this pass. Text models are skipped:
    their rows may be available only once, and all their layers are reached."""
    host, calibration, sites = job.host, job.calibration, job.changes.keys()
    modules, weights = host.sites(), dict[str, Tensor]()
    if not host.pictures:
        for site, module in modules.items():
            like = next(module.parameters())
            if like.is_meta:  # accelerate's hooks bring weights in; others run in no forward
                if not hasattr(module, "_hf_hook"):
                    continue
                like = torch.empty(0, dtype=like.dtype)
            weights[site] = weight_energy(module, like)
        return Trace(norms={site: float(energy) ** 0.5 for site, energy in weights.items()})
    short = replace(calibration, samples=1, timesteps=calibration.denoising_steps, latents="noise")
    # Some layers need words that one prompt may lack, such as text in quotes.
    every_prompt = replace(short, samples=calibration.samples, timesteps=1)
    generator = torch.Generator().manual_seed(calibration.seed)
    tick = partial(job.bare, "checking the sites")
    timings: list[StageTiming] = []
    reasons: dict[str, str | None] = {}
    joined: set[str] = set()
    streams: dict[str, Stream] = {}
    with Lockstep({}, {}) as lockstep, torch.no_grad():
        for every_kind, rows_of in ((False, short), (True, every_prompt)):
            request = SampleRequest(job.concepts, rows_of, lockstep, generator, tick)
            samples = host.samples(request)
            for stage in host.stages(samples, sites):
                why, mixed, timing, root = _probe(
                    replace(job, calibration=rows_of),
                    stage,
                    modules,
                    weights,
                    every_kind=every_kind,
                    sweep=sweep,
                )
                if mixed - joined:
                    joined |= joined_rows(stage, {site: modules[site] for site in mixed - joined})
                reasons |= why | dict.fromkeys(mixed - joined, MIXED)
                if every_kind:
                    continue
                timings.append(timing)
                if stage.spatial and stage.rows and root is not None:
                    # Two rows of one kind that are far apart in time
                    rows = [row for row in stage.rows if row.key == stage.rows[0].key]
                    run = partial(stage.forward, [rows[0], rows[-1]], 1)
                    streams |= find_streams(run, 2, modules, root)
            if sites <= reasons.keys() and MIXED not in reasons.values():
                break
    refused = {s: why for s in sites if (why := reasons.get(s, UNREACHED)) is not None}
    energies = zip(weights, on_host(weights.values()), strict=True)
    norms = {site: float(energy) ** 0.5 for site, energy in energies}
    return Trace(refused, timings, frozenset(joined - refused.keys()), streams, norms)


def _probe(
    job: Job,
    stage: Stage,
    modules: Mapping[str, nn.Module],
    weights: dict[str, Tensor],
    *,
    every_kind: bool,
    sweep: bool,
) -> tuple[dict[str, str | None], set[str], StageTiming, nn.Module | None]:
    """Why sites that ``stage`` reaches with its first row, or with the first row of every kind,
    cannot be merged (None: they can); those that get a different number of rows; the timing, of
    several rows at once: with few, most of a forward's time does not depend on their number; and
    the first module called that contains a site. ``weights`` gets the energies of those of the
    layers that it lacks."""
    firsts = {row.key if every_kind else None: row for row in reversed(stage.rows)}.values()
    wanted, layers, device, ran = set(stage.sites), set(modules.values()), torch.device("cpu"), 1
    root: nn.Module | None = None
    calls: dict[str, list[int]] = {}
    reached: dict[str, tuple[int, int, int]] = {}
    count: Counter[str] = Counter()
    mixed: set[str] = set()
    repeated: set[str] = set()
    measuring = False
    timing = StageTiming(stage, job.calibration, reached, 0.0, device, Step(""))

    def enter(module: nn.Module, _: Any) -> None:
        nonlocal root
        if root is None and not layers.isdisjoint(module.modules()):
            root = module
            entering.remove()

    def note(site: str, module: nn.Module, args: Any, _: Any, output: Tensor) -> None:
        nonlocal device, measuring
        if measuring:
            return
        device, (out, *rest) = output.device, weight_shape(module)
        if site in wanted:
            calls.setdefault(site, []).append(len(args[0]))
        reached[site] = output.numel() // max(out * ran, 1), out, math.prod(rest)
        if site not in weights:
            measuring = True
            weights[site] = weight_energy(module, args[0])
            measuring = False

    with ExitStack() as stack:
        entering = stack.enter_context(register_module_forward_pre_hook(enter))
        for site, module in modules.items():
            stack.enter_context(hooked([module], after=partial(note, site)))
        for row in firsts:
            sizes = [2] if every_kind else [2, 2]  # the first one may load weights to the device
            if not every_kind and job.memory_budget is not None:
                timing = replace(timing, forward=forward_of(stage))
                if is_apart(device):  # what a row leaves waits in host memory
                    timing.forward.waiting = 0
                sizes[1] = max(2, replace(job, trace=Trace(stages=[timing])).at_once(_TIMED))
            took: list[float] = []
            for ran in sizes:
                calls.clear()
                started = time.perf_counter()
                stage.forward([row] * ran, 1)
                wait_for(device)
                took.append(time.perf_counter() - started)
            timing = replace(timing, seconds=took[-1] / ran, device=device)
            if ran > 2:  # seconds grow in a line with the rows
                fixed = took[0] - 2 * (took[1] - took[0]) / (ran - 2)
                timing = replace(timing, fixed_seconds=min(max(fixed, 0.0), took[1]))
            count.update(calls.keys())
            mixed |= {site for site, rows in calls.items() if set(rows) != {ran}}
            repeated |= {site for site, rows in calls.items() if len(rows) > 1}
    for row in [row for row in stage.rows if row not in firsts] if stage.feeds_next else ():
        stage.forward([row], 1)
    why: dict[str, str | None] = dict.fromkeys(count)
    if sweep:
        why |= {site: PARTLY for site, times in count.items() if times < len(firsts)}
        why |= dict.fromkeys(repeated, REPEATED)
    return why, mixed, timing, root


def joined_rows(stage: Stage, modules: Mapping[str, nn.Module]) -> set[str]:
    """The ``modules``, sites of ``stage``, whose inputs are the rows' tokens one row after another:
    two rows of one kind, run together, give the first row's tokens followed by the second's. Rows
    that all give the same tokens, such as an image's height and width, show this too, unless the
    tokens repeat within a row."""

    def same(first: Tensor, second: Tensor) -> bool:
        return not differ(first, second, _ROUNDING)

    def repeats(tokens: Tensor) -> bool:
        parts = (tokens.reshape(n, -1) for n in range(2, len(tokens) + 1) if len(tokens) % n == 0)
        return any(same(some[1:], some[:-1]) for some in parts)

    of_kinds: dict[Hashable, list[int]] = {}
    for place, row in enumerate(stage.rows):
        of_kinds.setdefault(row.key, []).append(place)
    # Pairs of rows as far apart as possible.
    pairs = sorted(
        (at, rows[at], rows[-1 - at]) for rows in of_kinds.values() for at in range(len(rows) // 2)
    )
    undecided = {s: m for s, m in modules.items() if not isinstance(m, nn.Conv2d)}
    joined: set[str] = set()
    alike: set[str] = set()
    for _, one, other in pairs[:_PAIRS]:
        ways = [one, one], [other, other], [one, other]
        alone, beside, both = (_halves(stage, rows, undecided) for rows in ways)
        for site in alone.keys() & beside.keys() & both.keys():
            (first, again), (second, _), mixed = alone[site], beside[site], both[site]
            if same(first, second):  # another pair may tell more
                if same(first, again) and not repeats(first):
                    alike.add(site)
                continue
            del undecided[site]
            if same(first, again) and same(first, mixed[0]) and same(second, mixed[1]):
                joined.add(site)
        if not undecided:
            break
    return joined | (alike & undecided.keys())


def _halves(
    stage: Stage, rows: Sequence[int], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The tokens that each of two rows gives the ``modules``, (tokens, :data:`_NUMBERS`) each, for
    modules with equally many from both. A random projection represents a token, because a large
    model's inputs would not fit in memory at once."""
    halves: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(site: str, module: nn.Module, args: tuple[Any, ...], _: Any) -> None:
        inputs: Tensor = args[0]
        width = inputs.shape[-1]
        if inputs.ndim > 1 and inputs.numel() // width % 2 == 0:
            generator = torch.Generator().manual_seed(width)
            factors = torch.randn(width, _NUMBERS, generator=generator)
            tokens = inputs.detach().float() @ factors.to(inputs.device)
            first, second = tokens.cpu().reshape(2, -1, _NUMBERS)
            halves[site] = first, second

    with ExitStack() as stack:
        for site, module in modules.items():
            stack.enter_context(hooked([module], before=partial(keep, site)))
        stage.forward(stage.at(rows), 1)
    return halves


def complaint(
    refusals: Mapping[str, str], concepts: Sequence[Concept], *, refused: bool = True
) -> str:
    """The message about sites that cannot be merged: where, from which file, and what to do."""
    parts: list[str] = []
    for why, count in Counter(refusals.values()).items():
        site = min(name for name, reason in refusals.items() if reason == why)
        files = [
            concept.lora.source or concept.lora.name
            for concept in concepts
            if concept.lora is not None and site in concept.lora.sites
        ]
        parts.append(f"{count} sites, such as {site} (in {', '.join(files)}): it {why}")
    text = "; ".join(parts)
    if not refused:
        return text
    return (
        f"{len(refusals)} of the LoRAs' layers cannot be merged by their features: {text}. Give "
        "the model the input that these layers need (an image, a first frame, a control), or use "
        "option unmergeable: skip leaves them out, mean gives them the mean of the LoRAs' changes."
    )
