"""Run one base model on reference rows and merged rows at once.

The batch holds R reference rows, each with its own LoRA's change added at every site, and, with
``copies=2``, the same R samples again as merged rows, with the merged change added. A forward hook
on every site adds the changes to the site's output, so no weight is read or patched, and shows an
observer what it saw on the way. Nothing is stored here.

In a sweep every micro-batch's forward runs in a greenlet of its own that pauses at each site that
has no merged change yet; when all have arrived the site is solved and they go on, one at a time.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Protocol

import greenlet
import torch
from torch import Tensor, nn

from ..errors import IterisError
from ..lora import LowRank, SiteChanges
from .modes import Modes
from .parking import Parking
from .processes import ALONE, Processes
from .saliency import Saliency
from .site import Site, site_of
from .tokens import Group, Observation, TokenChoice


class Observer(Protocol):
    def observe(self, shown: Observation) -> None: ...


@dataclass
class MicroBatch:
    """``run`` does one forward of ``copies`` times the rows that ``owners`` (concepts) lists.

    ``merged_only`` gives all of them the merged changes and none their LoRA's. ``of_one`` says that
    all are the first owner's, however many rows the model makes of them. ``mask_of(site)``
    tells which tokens of the site's inputs count, (rows, tokens); ``choice`` picks some of them,
    and ``saliency`` tells how much each counts.
    """

    run: Callable[[], None]
    owners: Sequence[int]
    copies: int
    observer: Observer | None = None
    pauses: bool = False
    merged_only: bool = False
    of_one: bool = False
    mask_of: Callable[[str], Tensor | None] | None = None
    stage: str = ""
    choice: TokenChoice = field(default_factory=lambda: TokenChoice((), None, 0))
    saliency: Saliency | None = None
    streams: dict[nn.Module, Tensor] = field(default_factory=dict[nn.Module, Tensor])
    _seen: list[tuple[weakref.ref[Tensor], int, int]] = field(default_factory=list[Any])
    _groups: int = 0
    _calls: Counter[str] = field(default_factory=Counter[str])

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """Runs of rows of one concept, as (concept, start, stop)."""
        spans: list[tuple[int, int, int]] = []
        for row, owner in enumerate(self.owners):
            if spans and spans[-1][0] == owner:
                spans[-1] = (owner, spans[-1][1], row + 1)
            else:
                spans.append((owner, row, row + 1))
        return spans

    def group_of(self, tensor: Tensor) -> Group:
        """What stands for this tensor as it is now.

        Sites that receive one tensor object, unchanged in between, are of one group: their tokens
        are the same, so that moments are made once. Groups are numbered in execution order, which
        is that of every micro-batch.
        """
        self._seen = [entry for entry in self._seen if entry[0]() is not None]
        # An inference tensor has no version counter: an in-place change could not be noticed.
        if not tensor.is_inference():
            for ref, version, group in self._seen:
                if ref() is tensor and tensor._version == version:
                    return self.stage, group
        self._groups += 1
        if not tensor.is_inference():
            self._seen.append((weakref.ref(tensor), tensor._version, self._groups))
        return self.stage, self._groups

    def call_of(self, site: str) -> int:
        """How often the site was called before in this forward."""
        self._calls[site] += 1
        return self._calls[site] - 1

    def alive(self) -> set[Group]:
        """Groups whose tensor may still reach another site."""
        return {(self.stage, group) for ref, _, group in self._seen if ref() is not None}


class Lockstep:
    """Hooks on the sites of one model; a context manager that always takes them off again.

    ``changes[site][i]`` is concept i's change of that site, scaled by its strength, or None.
    ``merged`` holds the merged changes that are active on merged rows. ``streams`` are as
    :meth:`..hosts.protocol.Host.streams` gives them. ``processes`` says which rows are this one's.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        changes: Mapping[str, SiteChanges],
        streams: Mapping[str, nn.Module] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.changes = {name: SiteChanges.of(some) for name, some in changes.items()}
        self._modules = modules
        self._streams = streams or {}
        self._active: MicroBatch | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._cast: dict[tuple[str, int], LowRank] = {}
        self.merged: dict[str, LowRank] = {}
        self._outside = Modes.now()

    def __enter__(self) -> Lockstep:
        try:
            for name in self.changes:
                module = self._modules[name]
                hook = self._hook(name, site_of(name, module))
                self._handles.append(module.register_forward_hook(hook))
                if name in self._streams:
                    stream = self._streams[name]
                    self._handles.append(stream.register_forward_pre_hook(self._keep_stream))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def cast_bytes(self) -> int:
        """What the changes take that were cast to the model's dtype or moved to its device."""
        factors = (f for change in self._cast.values() for f in (change.up, change.down))
        return sum(factor.numel() * factor.element_size() for factor in factors)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._cast.clear()
        self._active = None

    def run(self, batch: MicroBatch, *, grad: bool = False) -> None:
        """One forward, start to end; with ``grad`` it can be differentiated by merged changes."""
        self._active = batch
        try:
            with torch.set_grad_enabled(grad):
                batch.run()
        finally:
            self._active = None

    def sweep(
        self,
        batches: Sequence[MicroBatch],
        solve: Callable[[str], LowRank],
        last: Set[str] = frozenset(),
        parking: Parking | None = None,
    ) -> None:
        """Run all micro-batches in step; ``solve(site)`` is called once all have shown it. When
        the ``last`` sites are solved, the forwards are not run to their end. With ``parking``,
        which has to be on, they wait there."""
        workers = [greenlet.greenlet(batch.run) for batch in batches]
        for batch in batches:
            batch.pauses = True
        try:
            with torch.no_grad():
                outside = self._outside = Modes.now()
                while True:
                    arrived: list[Any] = []
                    for number, (worker, batch) in enumerate(zip(workers, batches, strict=True)):
                        if parking is not None:
                            parking.turn(number)
                        self._active = batch
                        arrived.append(worker.switch())
                        outside.restore()
                        if parking is not None:
                            parking.rest()
                    ended = [worker.dead for worker in workers]
                    if all(ended):
                        return
                    if any(ended) or any(site != arrived[0] for site in arrived):
                        raise IterisError(
                            f"The micro-batches took different paths through the model ({arrived}),"
                            " so they cannot be merged in one sweep; use one micro-batch or "
                            'schedule="jacobi".'
                        )
                    self._active = None
                    self.merged[arrived[0]] = solve(arrived[0])
                    if last and last <= self.merged.keys():
                        return
        finally:
            self._active = None
            for worker in workers:
                if worker and not worker.dead:
                    worker.throw()
                    self._outside.restore()

    def _keep_stream(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._active is not None and self._active.observer is not None:
            self._active.streams[module] = args[0]

    def _stream_of(self, name: str, batch: MicroBatch, outputs: Tensor) -> Tensor | None:
        module = self._streams.get(name)
        stream = batch.streams.pop(module, None) if module is not None else None
        if stream is not None and stream.shape != outputs.shape:
            raise IterisError(
                f"Site {name} gives {tuple(outputs.shape)}, which cannot be added to its residual "
                f"stream {tuple(stream.shape)}; merge with repair=false."
            )
        return stream

    def _hook(self, name: str, site: Site) -> Callable[..., Tensor | None]:
        """Called when the site has given its output, in this order: reference rows get their own
        LoRA's change, the observer is shown both, the forward waits for the solve, and merged rows
        get the merged change."""
        # A change of zeros, as repair sites have, adds nothing.
        changes = [c if c is None or bool(c.up.any()) else None for c in self.changes[name]]

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            batch = self._active
            if batch is None:
                return None
            inputs: Tensor = args[0]
            if batch.of_one:
                change = changes[batch.owners[0]]
                if change is not None:
                    change = self._ready(name, batch.owners[0], change, inputs)
                    site.add(change, inputs, output)
                return output
            rows = len(batch.owners)
            if inputs.shape[0] != rows * batch.copies:
                raise IterisError(
                    f"Site {name} received {inputs.shape[0]} rows where {rows * batch.copies} were "
                    "expected: the model mixes or splits the batch, which lockstep cannot follow."
                )
            if batch.merged_only:
                merged = self.merged.get(name)
                if merged is None:
                    return None
                return output + site.delta(merged.to(inputs.dtype, inputs.device), inputs)
            for concept, start, stop in batch.spans:
                change = changes[concept]
                if change is not None:
                    change = self._ready(name, concept, change, inputs)
                    site.add(change, inputs[start:stop], output[start:stop])
            stream = self._stream_of(name, batch, output)
            call = batch.call_of(name)
            solved = batch.pauses and name in self.merged and not call
            if batch.observer is not None and not solved:
                batch.observer.observe(
                    Observation(
                        name,
                        site,
                        inputs,
                        output,
                        rows,
                        batch.copies,
                        batch.spans,
                        batch.group_of(inputs),
                        batch.alive(),
                        call,
                        batch.choice,
                        _mask_for(batch, name, inputs),
                        stream,
                        batch.saliency,
                    )
                )
            if batch.pauses and name not in self.merged:
                _pause(name, self._outside)
            merged = self.merged.get(name)
            if merged is not None and batch.copies == 2:
                site.add(merged.to(inputs.dtype, inputs.device), inputs[rows:], output[rows:])
            return output

        return hook

    def _ready(self, site: str, concept: int, change: LowRank, inputs: Tensor) -> LowRank:
        """The change in the inputs' dtype and on their device, made once."""
        if change.up.dtype == inputs.dtype and change.up.device == inputs.device:
            return change
        cached = self._cast.get((site, concept))
        if cached is None or cached.up.dtype != inputs.dtype:
            cached = self._cast[site, concept] = change.to(inputs.dtype, inputs.device)
        return cached


def _mask_for(batch: MicroBatch, site: str, inputs: Tensor) -> Tensor | None:
    """The mask of a site whose inputs are (rows, tokens, in); pooled inputs have no tokens."""
    mask = batch.mask_of(site) if batch.mask_of is not None else None
    if mask is None or inputs.ndim != 3 or inputs.shape[1] != mask.shape[1]:
        return None
    return mask


def _pause(site: str, outside: Modes) -> None:
    """Hand over to the sweep until ``site`` is solved.

    Greenlets share the thread, and with it torch's modes: whoever goes on has those of its own.
    """
    mine = Modes.now()
    if mine.inference != outside.inference:
        raise IterisError(
            f"Site {site} is called in another inference mode of torch than the merge, which "
            "cannot be left while a sweep waits there; run the model under torch.no_grad(), or "
            'merge with schedule="jacobi".'
        )
    current = greenlet.getcurrent()
    sweep: Any = current.parent
    sweep.switch(site)
    mine.restore()
