"""Observers that reduce what they are shown to one :class:`..solve.problem.Reduction` a site.

In a sweep forwards wait at a site until it is solved, so that what they show is kept until then and
reduced knowing all of it; else tokens are reduced as they stream by.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ..errors import IterisError
from ..lora import SiteChanges
from ..solve.inputs import InputMoments
from ..solve.moments import MomentReduction
from ..solve.problem import Begin, Opening, Reduction
from .processes import ALONE, Processes
from .tokens import Group, Observation


class Collector(ABC):
    """Reductions of sites until they are taken with :meth:`take`.

    ``begin`` makes a site's reduction, with moments in ``dtype``. Sites that receive the same
    tensor in the same geometry share the moments of their inputs. With ``processes`` every one of
    them is shown its part of the rows, and what is taken is of all. ``acting`` are the sites whose
    own changes tell an observation's saliency where a LoRA acts. ``inputs`` lists, for some sites,
    which of their inputs count.
    """

    def __init__(
        self,
        changes: Mapping[str, SiteChanges],
        begin: Begin,
        *,
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
        acting: Set[str] = frozenset(),
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._begin = begin
        self._changes = changes
        self._dtype = dtype
        self._processes = processes
        self._acting = acting
        self._inputs = inputs or {}
        self._shared: dict[tuple[Group, Hashable], InputMoments] = {}
        self._order: dict[tuple[str, int], Group] = {}

    def observe(self, shown: Observation) -> None:
        group = self._order.setdefault((shown.name, shown.call), shown.group)
        if group != shown.group:
            raise IterisError(
                f"The micro-batches took different paths through the model at site {shown.name}; "
                "use one micro-batch."
            )
        if shown.saliency is not None and shown.name in self._acting:
            changes = self._changes[shown.name]
            for concept, start, stop in shown.spans:
                change = changes[concept]
                if change is not None:
                    shown.saliency.add(shown.effect(change, start, stop), shown.rows, start)
        self._keep(shown.weighed())

    @abstractmethod
    def take(self, site: str) -> Reduction:
        """Hand over a site's reduction, ready to be solved, and forget it."""

    @abstractmethod
    def _keep(self, shown: Observation) -> None: ...

    def forget(self) -> None:
        """Let go of all that was shown and not taken."""
        self._shared.clear()
        self._order.clear()

    def _opened(self, shown: Observation, **known: Any) -> Reduction:
        changes, inputs = self._changes[shown.name], self._inputs.get(shown.name)
        # Only tensors that are still alive can be shared; letting go frees what the others had.
        for key in [key for key in self._shared if key[0] not in shown.alive]:
            del self._shared[key]
        key = shown.group, shown.site.geometry

        def share(kind: type[InputMoments]) -> tuple[InputMoments, bool]:
            shared = None if inputs is not None else self._shared.get(key)
            if isinstance(shared, kind):
                return shared, False
            width = changes.shape[1] if inputs is None else len(inputs)
            moments = kind(len(changes), width, self._dtype, shown.inputs.device)
            if inputs is None:
                self._shared[key] = moments
            return moments, True

        return self._begin(
            Opening(
                changes if inputs is None else changes.at(inputs),
                shown.inputs.device,
                share,
                shared=inputs is None and key in self._shared,
                processes=self._processes.size,
                agree=self._processes.first,
                **known,
            )
        )

    def _add(self, reduction: Reduction, shown: Observation) -> None:
        inputs = self._inputs.get(shown.name)
        for tokens in shown.of_concepts(self._changes[shown.name], self._dtype, inputs):
            reduction.add(tokens)

    def _ready(self, reduction: Reduction) -> Reduction:
        """Added up over all processes; what sites share only once."""
        if self._processes.size > 1:
            sums = reduction.sums()
            if isinstance(reduction, MomentReduction) and not reduction.inputs.summed:
                sums += reduction.inputs.sums()
                reduction.inputs.summed = True
            self._processes.add_up(sums)
        return reduction


class StreamCollector(Collector):
    """Tokens are reduced as they come; sites are taken when all have been shown."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._reductions: dict[str, Reduction] = {}

    @property
    def sites(self) -> list[str]:
        """Sites that nobody has taken, in execution order."""
        return list(self._reductions)

    def take(self, site: str) -> Reduction:
        return self._ready(self._reductions.pop(site))

    def _keep(self, shown: Observation) -> None:
        reduction = self._reductions.get(shown.name)
        if reduction is None:
            reduction = self._reductions[shown.name] = self._opened(shown)
        self._add(reduction, shown)


class SweepCollector(Collector):
    """What is shown waits until its site is taken, and is reduced then; ``narrow`` says that copies
    of the tokens that count wait, not the model's own tensors."""

    def __init__(self, *args: Any, narrow: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._narrow = narrow
        self._waiting: dict[str, list[Observation]] = {}

    def take(self, site: str) -> Reduction:
        waiting = self._waiting[site]

        def sample(tokens: int) -> list[Tensor]:
            return self._sample(site, waiting, tokens)

        tokens = sum(shown.count(0, shown.rows) for shown in waiting)
        reduction = self._opened(waiting[0], tokens=tokens, sample=sample)
        for shown in waiting:
            self._add(reduction, shown)
        del self._waiting[site]
        return self._ready(reduction)

    def forget(self) -> None:
        super().forget()
        for waiting in self._waiting.values():  # an error's traceback may hold the list
            waiting.clear()
        self._waiting.clear()

    def _keep(self, shown: Observation) -> None:
        if shown.call:
            raise IterisError(
                f"Site {shown.name} is called more than once in one forward, and a sweep solves it "
                'at its first call; merge with schedule="jacobi", which counts all of them.'
            )
        waiting = self._waiting.setdefault(shown.name, [])
        waiting.append(shown.narrowed() if self._narrow else shown)

    def _sample(self, site: str, waiting: Sequence[Observation], tokens: int) -> list[Tensor]:
        """About so many of all targets, by concept: as many of every row's tokens."""
        # Of a row's tokens that may be chosen some are masked.
        sizes = torch.tensor(
            [
                sum(shown.rows for shown in waiting),
                sum(shown.unmasked().count(0, shown.rows) for shown in waiting),
                sum(shown.count(0, shown.rows) for shown in waiting),
            ]
        )
        self._processes.add_up([sizes])
        rows, offered, counted = sizes.tolist()
        few = math.ceil(tokens / rows * offered / max(counted, 1))
        changes = self._changes[site]
        none = waiting[0].outputs.new_zeros(0, changes.shape[0], dtype=self._dtype)
        sample = [[none] for _ in changes]
        for shown in waiting:
            for part in shown.fewer(few).of_concepts(changes, self._dtype, None):
                sample[part.concept].append(part.target)
        return [self._processes.gather(torch.cat(parts)) for parts in sample]
