"""An observer that reduces a site's tensors to one :class:`..solve.problem.Reduction`.

Tokens are reduced as they stream by. In a sweep this begins once enough rows have been observed to
sample a site's targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError
from ..lora import SiteChanges
from ..solve.inputs import InputMoments
from ..solve.problem import Reduction, SiteContext, StageSolver
from .micro_batch import plain_modes
from .tokens import ConceptTokens, Group, Observation


class Collector:
    """Holds the sites' reductions until :meth:`take`, and adds tokens to them as they arrive. Sites
    that receive the same tensor in the same geometry share their input moments.

    In a sweep, targets are sampled from the rows ``sampled``: a site's observed tensors are kept
    until all of these rows have been observed, and reduced then; later tensors are reduced
    immediately, both within the context ``aside()``. ``narrow`` keeps copies of the tokens that
    count instead of the model's own tensors."""

    def __init__(
        self,
        changes: Mapping[str, SiteChanges],
        solver: StageSolver,
        sampled: Set[int] = frozenset(),
        *,
        narrow: bool = False,
        aside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._changes, self._solver = changes, solver
        self._inputs = solver.inputs or {}
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
        group = self._order.setdefault((shown.name, shown.call), shown.group)
        if group != shown.group:
            raise SiteError(
                f"The base runs differently from prompt to prompt at {shown.name}, perhaps through "
                "a node or hook on it. Merge on the base from before that, or use micro_batch=1."
            )
        if shown.saliency is not None:
            changes = self._changes[shown.name]
            for concept, start, stop in shown.spans if shown.name in self._solver.acting else ():
                change = changes[concept]
                if change is not None:
                    shown.saliency.add(shown.effect(change, start, stop), shown.rows, start)
            length = shown.site.length(shown.outputs)
            weights = shown.saliency.weights(shown.group, shown.alive, length)
            shown = replace(shown, weights=weights)
        site, sweep = shown.name, bool(self._sampled)
        if sweep and shown.call:
            raise SiteError(
                f"Site {site} is called more than once in one forward, and a sweep solves it "
                'at its first call; merge with schedule="jacobi", which counts all of them.'
            )
        if not sweep or site in self._reductions:
            with self._aside():
                self._reduce([shown])
            return
        waiting = self._waiting.setdefault(site, [])
        waiting.append(shown.gathered() if self._narrow else shown)
        if sum(row in self._sampled for of in waiting for row in of.choice.rows) == len(
            self._sampled
        ):
            with self._aside():
                self._reduce(waiting, partial(self._sample, site, waiting))
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
        self, some: Sequence[Observation], sample: Callable[[int], list[Tensor]] | None = None
    ) -> None:
        """Add the tokens of one site; its targets can be sampled if all its tensors are there."""
        shown = some[0]
        changes, inputs = self._changes[shown.name], self._inputs.get(shown.name)
        reduction = self._reductions.get(shown.name)
        if reduction is None:
            # Only tensors still alive can be shared; the rest is freed.
            for key in [key for key in self._shared if key[0] not in shown.alive]:
                del self._shared[key]
            own, device, key = changes, shown.inputs.device, (shown.group, shown.site.geometry)
            if inputs is not None:
                own, key = changes.at(inputs), None
            context = SiteContext(own, device, self._solver.dtype, self._shared, key, sample)
            reduction = self._reductions[shown.name] = self._solver.begin(context)
        for shown in some:
            for span in shown.spans:
                tokens = ConceptTokens(shown, changes, *span, self._solver.dtype, inputs)
                reduction.add(tokens)

    def _sample(self, site: str, waiting: Sequence[Observation], tokens: int) -> list[Tensor]:
        """About that many of all targets, by concept: equally many tokens from every sampled
        row."""
        of_rows = [
            (shown, row)
            for shown in waiting
            for row, number in enumerate(shown.choice.rows)
            if number in self._sampled
        ]
        # Some of a row's selectable tokens are masked.
        offered = sum(replace(shown, mask=None).count(row, row + 1) for shown, row in of_rows)
        counted = sum(shown.count(row, row + 1) for shown, row in of_rows)
        few = math.ceil(tokens / max(len(of_rows), 1) * offered / max(counted, 1))
        changes, dtype = self._changes[site], self._solver.dtype
        none = waiting[0].outputs.new_zeros(0, changes.shape[0], dtype=dtype)
        sample = [[none] for _ in range(len(changes))]
        for shown in waiting:
            part = replace(shown, choice=shown.choice.at_most(few))
            for row in [row for of, row in of_rows if of is shown]:
                concept = next(c for c, start, stop in shown.spans if start <= row < stop)
                tokens_of = ConceptTokens(part, changes, concept, row, row + 1, dtype)
                sample[concept].append(tokens_of.target)
        return [torch.cat(parts) for parts in sample]
