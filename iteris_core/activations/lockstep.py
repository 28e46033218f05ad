"""Runs a base model on reference rows and merged rows at once.

The batch holds R reference rows, each with the changes that it loads added at every site, and, with
``copies=2``, the same R samples again as merged rows, with the merged change added. A forward hook
on every site adds the changes to the site's output, so no weight is read or patched, and passes the
tensors to an observer. Nothing is stored here.

In a sweep every micro-batch's forward runs in its own greenlet, which pauses at the end of each
level of sites. When all have arrived, these sites are solved and the forwards continue, one at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SiteError
from ..lora import LowRank, SiteChanges
from .activation_offload import ActivationOffload
from .memory import tensors_in
from .micro_batch import MicroBatch, Modes, greenlets, pausing
from .rows import MERGED, Addition, Load, phantom
from .site import Site, by_row, site_of
from .streams import Source, Stream
from .trace import Barriers, hooked, unwritten


class _ReplayDone(BaseException):
    """Raised to leave a replay once the level has been observed."""


class Lockstep:
    """Hooks on the sites of one model; a context manager that always removes them.

    ``changes[site][i]`` is concept i's change of that site, scaled by its strength, or None.
    ``merged`` holds the changes that are active on merged rows. ``streams`` come from
    :meth:`..hosts.protocol.Host.streams`. The inputs of ``joined`` sites are the rows' tokens one
    row after another, in any shape.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        changes: Mapping[str, SiteChanges],
        streams: Mapping[str, Stream] | None = None,
        joined: Set[str] = frozenset(),
    ) -> None:
        self.changes = {name: SiteChanges.of(some) for name, some in changes.items()}
        self.merged: dict[str, LowRank] = {}
        self._modules, self._streams, self._joined = modules, streams or {}, joined
        self._active: MicroBatch | None = None
        self._hooks = ExitStack()
        self._cast: dict[tuple[str, int], tuple[LowRank, LowRank]] = {}
        self._barriers = Barriers()

    def __enter__(self) -> Lockstep:
        with ExitStack() as stack:
            for name in self.changes:
                module = self._modules[name]
                hook = self._hook(name, site_of(name, module))
                stack.enter_context(hooked([module], after=hook))
            streams = [of for name, of in self._streams.items() if name in self.changes]
            for source in dict.fromkeys(of for s in streams for of in (s.source, s.gate) if of):
                keep = partial(self._keep, source)
                before, after = (None, keep) if source.returned else (keep, None)
                stack.enter_context(hooked([source.module], before, after))
            self._hooks = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._hooks.close()
        self._cast.clear()
        self._active = None

    @property
    def cast_bytes(self) -> int:
        """Bytes of changes that were cast to the model's dtype or moved to its device."""
        return sum(f.nbytes for _, cast in self._cast.values() for f in (cast.up, cast.down))

    def run(self, batch: MicroBatch, *, grad: bool = False) -> None:
        """One complete forward; with ``grad`` it can be differentiated with respect to merged
        changes."""
        with self.active(batch), torch.set_grad_enabled(grad):
            batch.run()

    @contextmanager
    def active(self, batch: MicroBatch) -> Generator[None]:
        """Context in which the model's forwards belong to ``batch``."""
        self._active = batch
        try:
            yield
        finally:
            self._active = None

    @contextmanager
    def in_barriers(self, barriers: Barriers) -> Generator[None]:
        """Context in which pausing forwards pause at the end of each of ``barriers``, and replay
        their blocks."""
        self._barriers = barriers
        try:
            with hooked(barriers.blocks, before=self._replay):
                yield
        finally:
            self._barriers = Barriers()

    def sweep(
        self, batches: Sequence[MicroBatch], offload: ActivationOffload | None = None
    ) -> Generator[Sequence[str]]:
        """Run all micro-batches in step. Yields the sites of every level when all forwards wait
        there; they continue with the changes that ``merged`` has by then. If the generator is
        closed, they do not run to their end. With ``offload``, which must be active, they wait
        there."""
        greenlet = greenlets()
        workers = [greenlet.greenlet(batch.run) for batch in batches]
        before = Modes.now()
        try:
            with torch.no_grad():
                outside = Modes.now()
                for batch in batches:
                    batch.pause = pausing(outside, greenlet.getcurrent)
                    batch.passed.update(self.merged)
                while True:
                    arrived: list[Any] = []
                    for number, (worker, batch) in enumerate(zip(workers, batches, strict=True)):
                        if offload is not None:
                            offload.turn(number)
                        self._active = batch
                        arrived.append(worker.switch())
                        outside.restore()
                        if offload is not None:
                            offload.rest()
                    ended = [worker.dead for worker in workers]
                    if all(ended):
                        return
                    if any(ended) or any(site != arrived[0] for site in arrived):
                        raise SiteError(
                            f"The base runs differently from prompt to prompt ({arrived}), perhaps "
                            "through a node or hook on it. Merge on the base from before that, or "
                            "use schedule=jacobi."
                        )
                    self._active = None
                    yield self._barriers.level(arrived[0])
        finally:
            self._active = None
            for worker in workers:
                if worker and not worker.dead:
                    worker.throw()
                    before.restore()
            for batch in batches:
                batch.pending.clear()

    def _replay(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Before a block's run, the active forward waits until its sites are solved, level by
        level."""
        batch = self._active
        if batch is None or batch.pause is None or batch.until is not None:
            return
        written = self._barriers.written.get(module, frozenset())
        for last in self._barriers.blocks[module]:
            if last in batch.passed:
                continue
            copies, kept = unwritten(written, args, kwargs), dict(batch.kept)
            batch.until = last
            try:
                module(*copies[0], **copies[1])
                batch.reached.append(f"no {last}")  # waiting for it then raises the error
            except _ReplayDone:
                pass
            finally:
                batch.until, batch.kept = None, kept
            del copies
            batch.wait(self._barriers.level(last))

    def _keep(
        self, source: Source, module: nn.Module, args: Any, kwargs: Any, output: Any = None
    ) -> None:
        """Keep the tensor at ``source`` for the sites that follow."""
        if self._active is not None and self._active.observer is not None:
            tensors = tensors_in(output if source.returned else (args, kwargs))
            self._active.kept[source] = tensors[source.number]

    def _stream_of(self, name: str, batch: MicroBatch, outputs: Tensor) -> dict[str, Tensor]:
        """The ``stream`` to which a site's output will be added, and the ``gate``, (rows,
        channels); empty if unknown."""
        of = self._streams.get(name)
        stream = batch.kept.pop(of.source, None) if of is not None else None
        if of is None or stream is None:
            return {}
        if stream.numel() == outputs.numel() and stream.shape[0] == outputs.shape[0]:
            stream = stream.reshape(outputs.shape)
        if stream.shape != outputs.shape:
            raise SiteError(
                f"Site {name} outputs {tuple(outputs.shape)}, which cannot be added to its "
                f"residual stream {tuple(stream.shape)}; merge with repair=false."
            )
        values = None if of.gate is None else batch.kept.get(of.gate)
        if values is None and of.gate is not None:
            return {}
        gate = of.gates(values, len(outputs))
        return {"stream": stream} if gate is None else {"stream": stream, "gate": gate}

    def _hook(self, name: str, site: Site) -> Callable[..., Tensor | None]:
        """Called with the site's output. In this order: rows get what they load, the observer sees
        them, the forward waits for the solve, and merged rows get the merged change."""
        joined, every = name in self._joined, self.changes[name]
        # A zero change, as at repair sites, adds nothing.
        nonzero = [None if c is None or c.is_zero else c for c in every.by_concept]

        def change_of(load: Load, inputs: Tensor) -> LowRank | None:
            merged = load.concept == MERGED
            change = self.merged.get(name) if merged else nonzero[load.concept]
            if change is None:
                return None
            change = self._ready(name, load.concept, change, inputs)
            return change if load.seed is None else phantom(name, change, load.seed)

        def add(added: Addition, inputs: Tensor, output: Tensor) -> Tensor:
            """``output`` with the change; in place, unless gradients are wanted."""
            change = change_of(added.load, inputs)
            if change is None:
                return output
            rows, strengths = slice(added.start, added.stop), added.strengths.like(inputs)
            if not torch.is_grad_enabled():
                site.add(change, inputs[rows], output[rows], strengths)
                return output
            delta = by_row(site.delta(change, inputs[rows]), strengths)
            if len(delta) == len(output):
                return output + delta
            output = output.clone()
            output[rows] += delta
            return output

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
            batch = self._active
            if batch is None:
                return None
            inputs: Tensor = args[0]
            for concept in batch.always:
                if (change := change_of(Load(concept), inputs)) is not None:
                    site.add(change, inputs, output)
            if not batch.rows:
                return output
            rows, shape = len(batch.rows) * batch.copies, output.shape
            if joined and not inputs[..., 0].numel() % rows:
                inputs, output = (
                    tokens.reshape(rows, -1, tokens.shape[-1]) for tokens in (inputs, output)
                )
            if inputs.shape[0] != rows:
                raise SiteError(
                    f"Site {name} received {inputs.shape[0]} rows where {rows} were expected: the "
                    "model mixes or splits the batch, which lockstep cannot follow."
                )
            for added in batch.additions:
                output = add(added, inputs, output)
            tensors = {} if joined else self._stream_of(name, batch, output)
            normed = "gate" in tensors and self._streams[name].norm is not None
            tensors |= {"inputs": inputs, "outputs": output}
            solved = batch.observe(name, site, every, args[0], normed=normed, **tensors)

            def add_merged() -> None:
                for added in batch.merged:
                    add(added, inputs, output)

            if batch.pause is None or solved:
                add_merged()
                return output.view(shape)
            # The last site of a level waits for all of them, then their changes are added.
            batch.reached.append(name)
            if batch.until is None:
                batch.pending.append(add_merged)
            if self._barriers.ends_at(name):
                if batch.until == name:
                    raise _ReplayDone
                batch.wait(self._barriers.level(name))
                while batch.pending:
                    batch.pending.pop()()
            return output.view(shape)

        return hook

    def _ready(self, site: str, concept: int, change: LowRank, inputs: Tensor) -> LowRank:
        """A concept's ``change``, or the merged one, in the inputs' dtype and on their device,
        converted once; an ordinary tensor where gradients are wanted."""
        like, ordinary = (inputs.dtype, inputs.device), torch.is_grad_enabled()
        if (change.up.dtype, change.up.device) == like:
            if not (ordinary and change.up.is_inference()):
                return change
        elif change.up.requires_grad:  # a step of training changes it in place
            return change.to(*like)
        source, cast = self._cast.get((site, concept), (None, change))
        unusable = ordinary and cast.up.is_inference()
        if source is not change or cast.up.dtype != inputs.dtype or unusable:
            cast = change.to(*like)
            if ordinary and cast.up.is_inference():
                cast = replace(cast, up=cast.up.clone(), down=cast.down.clone())
            self._cast[site, concept] = change, cast
        return cast
