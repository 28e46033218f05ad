"""The register of merge methods.

One of three decorators registers a method. :func:`on_weights` is for methods that look at one
site's changes at a time, :func:`on_activations` for methods that reduce a site's tokens and solve
from the reduction, :func:`on_model` for everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from inspect import isgeneratorfunction
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..calibration import Calibration, over
from ..errors import SettingsError, did_you_mean
from ..linalg import least_kept
from ..lora import LowRank, SiteChanges
from ..passes.batches import REFERENCE, SWEEP, ExecutionConfig
from ..passes.job import Job, Merged
from ..passes.sweep import Passes
from ..settings import PRESETS, PresetName, Settings, setting
from ..solve.problem import RegressionSpec, Solution, StageSolver


def rank_setting(
    help: str = "Rank of the result.",
    none: str = "the sum of the LoRAs' ranks",
    share: str = "energy",
    most: float | None = None,
) -> Any:
    """A setting for a rank up to ``most``, or for a share of the ``share`` to keep, with its
    ``help`` and what None stands for (``none``)."""
    return setting(None, help, none=none, share=share, low=1, most=most)


def micro_batch_setting() -> int:
    """A setting for the rows per forward, as :func:`on_activations` needs it."""
    return setting(32, "Rows per forward; the result does not depend on it.", low=1)


@dataclass(frozen=True)
class Fit:
    """What a method is about to do with a job, while the job's model is ready: ``merge`` does it,
    and its ``passes`` can be planned alone (None: they cannot, or there are none)."""

    merge: Callable[[], Merged]
    passes: Passes | None = None


Sweeps = Callable[[Any], int]


@dataclass(frozen=True)
class Method:
    """A registered method. ``prepare(job, settings)`` is a context, which gives its :class:`Fit`;
    it runs the job's host only if ``needs_host``. ``sweeps(settings)`` is the number of sweeps, in
    which forwards wait at every site until it is solved; if it is not 0, every forward must reach
    all sites exactly once. ``sums`` says whether rows may have the sum of several LoRAs as their
    target, as composites have."""

    name: str
    prepare: Callable[[Any, Any], AbstractContextManager[Fit]]
    settings: type[Settings]
    needs_host: bool
    summary: str
    sweeps: Sweeps
    sums: bool


_METHODS: dict[str, Method] = {}

Function = TypeVar("Function", bound=Callable[..., Any])
_S = TypeVar("_S", bound=Settings)


@dataclass(frozen=True)
class AtSite:
    """One site for a method on weights: the changes there, and their weights. ``least`` is each
    concept's magnitude below which a method that trims all sites together sets entries to 0."""

    changes: SiteChanges
    weights: Sequence[float]
    generator: torch.Generator
    least: Mapping[int, float] = field(default_factory=dict[int, float])

    def weighted(self) -> list[LowRank]:
        """w_i ΔW_i for the LoRAs that change the site."""
        return self.changes.weighted(self.weights)

    def dense(self) -> list[Tensor]:
        """w_i ΔW_i, (out, in), float64."""
        present = self.changes.present.items()
        return [c.up.double() @ c.down.double() * self.weights[i] for i, c in present]

    def trimmed(self, entries: Sequence[Tensor]) -> Tensor:
        """(concepts, …): the ``entries`` of the concepts that change the site, with small ones set
        to 0."""
        parts = zip(self.changes.present, entries, strict=True)
        return torch.stack(
            [e.where(e.abs().float() >= self.least.get(i, 0.0), 0) for i, e in parts]
        )


def on_weights(
    name: str, settings: type[Settings], trims: Callable[[AtSite], Sequence[Tensor]] | None = None
) -> Callable[[Function], Function]:
    """Register ``function(at, settings) -> (change, share of energy lost in a cut)`` as the method
    ``name``. It is called for every site; the first line of its docstring is the method's summary.
    ``trims(at)`` returns the entries of each concept that changes the site. Of these, the settings'
    ``density`` share is kept over all sites together; ``at.trimmed`` applies it."""

    def merge(function: Function, job: Job, values: Any) -> Merged:
        merged: dict[str, Solution] = {}

        def entries() -> Iterator[dict[int, Tensor]]:
            """A pass over all sites: their entries by concept."""
            job.eta.expect("merging sites", [1.0])
            for done, changes in enumerate(job.changes.values(), 1):
                parts = trims(AtSite(changes, job.weights, job.generator)) if trims else ()
                yield dict(zip(changes.present, parts, strict=True))
                job.tick("trimming sites", done, len(job.changes))

        least = {} if trims is None else least_kept(entries, values.density)
        for site, changes in job.changes.items():
            change, lost = function(AtSite(changes, job.weights, job.generator, least), values)
            merged[site] = Solution(change, truncated=lost)
            job.tick("merging sites", len(merged), len(job.changes))
        return Merged(merged)

    def register(function: Function) -> Function:
        _add(name, function, settings, _only_merging(partial(merge, function)), needs_host=False)
        return function

    return register


def on_activations(
    name: str,
    settings: type[Settings],
    reduction: type[Any],
    *,
    merged_inputs: bool,
    sums: bool = True,
) -> Callable[[Function], Function]:
    """Register ``function(job, settings) -> RegressionSpec`` as the method ``name``: how to solve
    from the ``reduction`` of a site's tokens. ``sums`` is as in :class:`Method`. With
    ``merged_inputs``, sites are solved in one sweep, on inputs that passed through the sites solved
    before; otherwise on reference rows alone. ``settings`` must have a ``micro_batch``."""

    def prepare(function: Function, job: Job, values: Any) -> Generator[Fit]:
        fit: RegressionSpec = function(job, values)
        solver = StageSolver(
            begin=reduction,
            solve=lambda _, reduced: reduced.solve(fit),
            bytes=lambda site, _: reduction.bytes(job.changes[site]),
        )
        how = ExecutionConfig(values.micro_batch), SWEEP if merged_inputs else REFERENCE
        with job.run() as run:
            passes = Passes(run, lambda _: solver, *how)
            yield Fit(passes.solve, passes)

    def register(function: Function) -> Function:
        context = contextmanager(partial(prepare, function))
        _add(name, function, settings, context, sweeps=lambda _: merged_inputs, sums=sums)
        return function

    return register


def on_model(
    name: str, settings: type[Settings], *, sweeps: Sweeps = lambda _: 0, sums: bool = False
) -> Callable[[Function], Function]:
    """Register ``function(job, settings) -> Merged``, or a generator that gives one :class:`Fit`,
    as the method ``name``. ``sweeps`` must declare how often its :class:`..passes.sweep.Passes`
    sweep; ``sums`` is as in :class:`Method`."""

    def register(function: Function) -> Function:
        context = (
            contextmanager(function) if isgeneratorfunction(function) else _only_merging(function)
        )
        _add(name, function, settings, context, sweeps=sweeps, sums=sums)
        return function

    return register


def _only_merging(function: Callable[..., Merged]) -> Callable[..., AbstractContextManager[Fit]]:
    """The context of a method whose ``function`` only merges."""
    return lambda *given: nullcontext(Fit(partial(function, *given)))


def _add(
    name: str,
    function: Callable[..., Any],
    settings: type[Settings],
    context: Callable[..., AbstractContextManager[Fit]],
    *,
    needs_host: bool = True,
    sweeps: Sweeps = lambda _: 0,
    sums: bool = False,
) -> None:
    if name in _METHODS:
        raise ValueError(f"A method {name!r} already exists.")
    summary = (function.__doc__ or "").strip().splitlines()[0]
    _METHODS[name] = Method(name, context, settings, needs_host, summary, sweeps, sums)


def find_method(name: str) -> Method:
    """The method ``name``. Raises :class:`SettingsError`, with what is alike, if there is none."""
    if name not in _METHODS:
        guess = did_you_mean(name, _METHODS)
        raise SettingsError(f"There is no method {name!r}{guess} Methods: {', '.join(_METHODS)}.")
    return _METHODS[name]


def all_methods() -> list[Method]:
    """All registered methods, in the order of their registration."""
    return list(_METHODS.values())


def settings_over(
    preset: PresetName,
    method: str,
    settings: Settings | Mapping[str, Any] | None,
    calibration: Calibration | Mapping[str, Any] | None,
) -> tuple[Settings, Calibration]:
    """The ``settings`` and ``calibration`` over those of the ``preset`` for ``method``; a whole
    dataclass replaces the preset's. A number of samples that is given alone counts for each
    LoRA."""
    if preset not in PRESETS:
        raise SettingsError(f"preset must be one of {', '.join(PRESETS)}, not {preset!r}.")
    chosen, kind = PRESETS[preset], find_method(method).settings
    if isinstance(calibration, Mapping):
        calibration = over(chosen.calibration, calibration)
    return (
        _over(chosen.settings if method == "iteris" else {}, settings, kind),
        _over(chosen.calibration, calibration, Calibration),
    )


def _over(preset: Mapping[str, Any], values: _S | Mapping[str, Any] | None, kind: type[_S]) -> _S:
    if isinstance(values, kind):
        return values
    if values is None or isinstance(values, Mapping):
        return kind.from_mapping({**preset, **(values or {})})
    raise SettingsError(f"Give a mapping or {kind.__name__}, not {type(values).__name__}.")
