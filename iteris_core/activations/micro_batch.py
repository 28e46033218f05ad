"""One of the forwards that run in step, its state, and how it pauses."""

from __future__ import annotations

import importlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..errors import SiteError, UsageError
from ..lora import SiteChanges
from .rows import (
    MERGED,
    Addition,
    Row,
    Strengths,
    additions,
    loads_of,
    phantoms,
    strength_of,
)
from .site import Site
from .streams import Source
from .tokens import Group, Observation, Saliency, TokenSampling
from .trace import version_of

_DEVICES = ("cpu", "cuda", "mps", "xpu")

Observer = Callable[[Observation], None]


@dataclass
class MicroBatch:
    """``run`` does one forward of the ``rows`` as reference rows, followed by the same rows as
    merged rows if ``copies`` is 2. The changes of the concepts in ``always`` are on in every row,
    however many rows the model makes of its inputs. ``mask_of(site)`` says which tokens of the
    site's inputs count, (rows, tokens); ``sampling`` selects some of them, and ``saliency`` is the
    share in :class:`.tokens.Saliency`, which weights them. With ``pause`` the forward stops at the
    end of every level, until its sites are solved. ``passed`` are the solved sites, ``reached``
    those of the current level; ``pending`` add their merged changes once known. ``until`` is where
    a replay ends. ``kept`` are the tensors of residual streams and gates."""

    run: Callable[[], None]
    rows: Sequence[Row] = ()
    copies: int = 1
    observer: Observer | None = None
    pause: Callable[[str], None] | None = None
    always: Sequence[int] = ()
    mask_of: Callable[[str], Tensor | None] | None = None
    stage: str = ""
    sampling: TokenSampling = field(default_factory=TokenSampling)
    saliency: float = 0.0
    kept: dict[Source, Tensor] = field(default_factory=dict[Source, Tensor])
    passed: set[str] = field(default_factory=set[str])
    until: str | None = None
    reached: list[str] = field(default_factory=list[str])
    pending: list[Callable[[], object]] = field(default_factory=list[Callable[[], object]])
    _seen: list[tuple[weakref.ref[Tensor], int, int]] = field(default_factory=list[Any])
    _groups: int = 0
    _calls: Counter[str] = field(default_factory=Counter[str])

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Runs of rows of one concept, as (concept, start, stop)."""
        spans: list[tuple[int, int, int]] = []
        for place, row in enumerate(self.rows):
            if spans and spans[-1][0] == row.concept:
                spans[-1] = (row.concept, spans[-1][1], place + 1)
            else:
                spans.append((row.concept, place, place + 1))
        return spans

    @cached_property
    def additions(self) -> list[Addition]:
        """What rows add before a site is observed: reference rows all that they load, merged rows
        their phantoms."""
        loads = [row.loaded for row in self.rows]
        copies = [phantoms(of) for of in loads] if self.copies == 2 else []
        return additions([*loads, *copies])

    @cached_property
    def merged(self) -> list[Addition]:
        """What merged rows add once a site is solved."""
        if self.copies == 1:
            return []
        loads = [loads_of([MERGED], strength_of(row.loaded)) for row in self.rows]
        return additions(loads, len(self.rows))

    @cached_property
    def _strengths(self) -> Strengths:
        return Strengths([strength_of(row.loaded) for row in self.rows] * self.copies)

    @cached_property
    def _of_spans(self) -> tuple[list[TokenSampling], list[Saliency | None]]:
        """Each span's."""
        samplings = [self.sampling.part(start, stop) for _, start, stop in self.spans]
        return samplings, [Saliency(self.saliency) if self.saliency else None for _ in samplings]

    def observe(
        self,
        name: str,
        site: Site,
        changes: SiteChanges,
        received: Tensor,
        *,
        normed: bool,
        **tensors: Tensor,
    ) -> bool:
        """Show a site, which ``received`` a tensor, to the observer, concept by concept, unless it
        is solved; returns whether it is. ``tensors`` are those of :class:`.tokens.Observation`, but
        with all rows, reference rows before merged rows."""
        call = self._calls[name]
        if self.until is None:  # not a replay
            self._calls[name] += 1
        else:
            call = 0
        solved = name in self.passed and not call
        if self.observer is None or solved:
            return solved
        mask, inputs = self.mask_of(name) if self.mask_of is not None else None, tensors["inputs"]
        # Pooled inputs have no tokens.
        if mask is not None and (inputs.ndim != 3 or inputs.shape[1] != mask.shape[1]):
            mask = None
        if (strengths := self._strengths.like(inputs)) is not None:
            tensors["strengths"] = strengths
        group = self._group_of(received)
        alive = {(self.stage, number) for tensor, _, number in self._seen if tensor() is not None}
        show = partial(
            Observation, name, site, changes, group=group, alive=alive, call=call, normed=normed
        )
        copies = {key: tensor.unflatten(0, (self.copies, -1)) for key, tensor in tensors.items()}
        for span, sampling, saliency in zip(self.spans, *self._of_spans, strict=True):
            concept, start, stop = span
            rows: dict[str, Any] = {key: tensor[:, start:stop] for key, tensor in copies.items()}
            if mask is not None:
                rows["mask"] = mask[start:stop]
            self.observer(show(concept, sampling=sampling, saliency=saliency, **rows))
        return solved

    def _group_of(self, tensor: Tensor) -> Group:
        """A key for this tensor as a site received it. Sites that receive the same tensor object,
        unchanged in between, form a group: their tokens are the same, so moments are computed once.
        Groups are numbered in execution order, which is the same for every micro-batch."""
        self._seen = [entry for entry in self._seen if entry[0]() is not None]
        now = version_of(tensor)
        for seen, version, number in self._seen:
            if seen() is tensor and version == now:
                return self.stage, number
        self._groups += 1
        if now is not None:  # an in-place change of an inference tensor could not be noticed
            self._seen.append((weakref.ref(tensor), now, self._groups))
        return self.stage, self._groups

    def wait(self, level: Sequence[str]) -> None:
        """Wait until the sites of ``level`` are solved; they must be those that were reached."""
        reached, self.reached = self.reached, []
        if reached != list(level):
            raise SiteError(
                f"A micro-batch took another path through the model (it reached {reached}, where "
                f"{list(level)} were to be solved), so it cannot be merged in one sweep; use one "
                'micro-batch or schedule="jacobi".'
            )
        if self.pause is not None:
            self.pause(level[-1])
        self.passed.update(level)


@dataclass(frozen=True)
class Modes:
    """Torch's modes of this thread: gradients, autocast per device with its dtype, its cache."""

    grad: bool
    inference: bool
    autocast: Sequence[tuple[str, bool, torch.dtype]]
    cache: bool

    @staticmethod
    def now() -> Modes:
        autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
            for device in _DEVICES
        ]
        inference, cache = torch.is_inference_mode_enabled(), torch.is_autocast_cache_enabled()
        return Modes(torch.is_grad_enabled(), inference, autocast, cache)

    def restore(self) -> None:
        """Set all but inference mode, which cannot be set."""
        torch.set_grad_enabled(self.grad)
        for device, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cache)


@contextmanager
def plain_modes() -> Generator[None]:
    """Context without gradients and autocast, which are the model's own within a forward."""
    before = Modes.now()
    off = [(device, False, dtype) for device, _, dtype in before.autocast]
    replace(before, grad=False, autocast=off).restore()
    try:
        yield
    finally:
        before.restore()


def greenlets() -> Any:
    """The greenlet package. Raises :class:`UsageError` if it is not installed."""
    try:
        return importlib.import_module("greenlet")
    except ImportError as error:
        raise UsageError(
            "A merge in one sweep needs the package greenlet, which this Python lacks: run "
            f'"{sys.executable}" -m pip install greenlet. Without it there is schedule="jacobi".'
        ) from error


def pausing(outside: Modes, current: Callable[[], Any]) -> Callable[[str], None]:
    """A pause that hands over to the sweep until a site is solved. Greenlets share the thread, and
    with it torch's modes; each one restores its own."""

    def pause(site: str) -> None:
        mine = Modes.now()
        if mine.inference != outside.inference:
            raise SiteError(
                f"Site {site} is called in another inference mode of torch than the merge, which "
                "cannot be left while a sweep waits there; run the model under torch.no_grad(), or "
                'merge with schedule="jacobi".'
            )
        current().parent.switch(site)
        mine.restore()

    return pause
