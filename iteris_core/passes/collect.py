"""An observer that reduces a site's tensors to one :class:`..solve.problem.Reduction`.

Tokens are reduced as they stream by. In a sweep this begins once enough rows have been observed to
sample a site's targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..activations.micro_batch import plain_modes
from ..activations.tokens import Group, Observation
from ..errors import SiteError
from ..solve.inputs import InputMoments
from ..solve.problem import Reduction, SiteContext, StageSolver


class Collector:
    """Holds the sites' reductions until :meth:`take`, and adds tokens to them as they arrive. Sites
    that receive the same tensor in the same geometry share their input moments.

    In a sweep, targets are sampled from the rows ``sampled``, which run before all others: a site's
    observed tensors are kept until all of these rows have been observed, and reduced then; later
    tensors are reduced immediately, both within the context ``aside()``. ``narrow`` keeps copies of
    the tokens that count instead of the model's own tensors."""

    def __init__(
        self,
        solver: StageSolver,
        sampled: Set[int] = frozenset(),
        *,
        narrow: bool = False,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._solver, self._inputs = solver, solver.inputs or {}
        self._sampled, self._narrow, self._aside = sampled, narrow, aside
        self._shared: dict[Any, InputMoments] = {}
        self._order: dict[tuple[str, int], Group] = {}
        self._reductions: dict[str, Reduction] = {}
        self._waiting: dict[str, list[Observation]] = {}

    @property
    def sites(self) -> list[str]:
        """Sites with a reduction that has not been taken, in execution order."""
        return list(self._reductions)

    @plain_modes()
    def observe(self, shown: Observation) -> None:
        site = shown.name
        group = self._order.setdefault((site, shown.call), shown.group)
        if group != shown.group:
            raise SiteError(
                f"The base runs differently from prompt to prompt at {site}, perhaps through "
                "a node or hook on it. Merge on the base from before that, or use micro_batch=1."
            )
        if shown.saliency is not None:
            change = shown.changes[shown.concept] if site in self._solver.acting else None
            if change is not None:
                shown.saliency.add(shown.effect(change))
            weights = shown.saliency.weights(shown.group, shown.alive, shown.length)
            shown = replace(shown, weights=weights)
        if self._sampled and shown.call:
            raise SiteError(
                f"Site {site} is called more than once in one forward, and a sweep solves it "
                'at its first call; merge with schedule="jacobi", which counts all of them.'
            )
        if not self._sampled or site in self._reductions:
            with self._aside():
                self._reduce([shown])
            return
        waiting = self._waiting.setdefault(site, [])
        waiting.append(shown.gathered() if self._narrow else shown)
        if sum(len(of.sampling.rows) for of in waiting) == len(self._sampled):
            with self._aside():
                self._reduce(waiting, partial(self._sample, waiting))
            del self._waiting[site]

    def take(self, site: str) -> Reduction:
        """Hand over a site's reduction, ready to be solved, and forget it."""
        return self._reductions.pop(site)

    def forget(self) -> None:
        """Drop everything that was observed but not taken."""
        self._reductions.clear()
        self._shared.clear()
        self._order.clear()
        for waiting in self._waiting.values():  # an error's traceback may keep the list alive
            waiting.clear()
        self._waiting.clear()

    def _reduce(
        self, shown: Sequence[Observation], sample: Callable[[int], list[Tensor]] | None = None
    ) -> None:
        """Add the tokens of one site; its targets can be sampled if all its tensors are there."""
        first, dtype = shown[0], self._solver.dtype
        changes, columns = first.changes, self._inputs.get(first.name)
        reduction = self._reductions.get(first.name)
        if reduction is None:
            # Only tensors still alive can be shared; the rest is freed.
            for key in [key for key in self._shared if key[0] not in first.alive]:
                del self._shared[key]
            device, key = first.inputs.device, (first.group, first.site.geometry)
            if columns is not None:
                changes, key = changes.at(columns), None
            context = SiteContext(changes, device, dtype, self._shared, key, sample)
            reduction = self._reductions[first.name] = self._solver.begin(context)
        for of_concept in shown:
            reduction.add(replace(of_concept, dtype=dtype, columns=columns))

    def _sample(self, waiting: Sequence[Observation], tokens: int) -> list[Tensor]:
        """About that many of all targets, by concept: equally many tokens from every row."""
        dtype, changes, rows = self._solver.dtype, waiting[0].changes, len(self._sampled)
        # Some of a row's selectable tokens are masked.
        offered = sum(replace(shown, mask=None).count for shown in waiting)
        counted = sum(shown.count for shown in waiting)
        few = math.ceil(tokens / rows * offered / max(counted, 1))
        none = waiting[0].outputs.new_zeros(0, changes.shape[0], dtype=dtype)
        sample = [[none] for _ in range(len(changes))]
        for shown in waiting:
            part = replace(shown, sampling=shown.sampling.at_most(few), dtype=dtype)
            sample[shown.concept].append(part.target)
        return [torch.cat(parts) for parts in sample]
