"""A sweep by memoised modules, compared with today's, in which forwards wait in greenlets.

``python benchmarks/memoised.py`` writes ``results/memoised.json``. A forward is aborted at the end
of every level of sites and started again once the level is solved. Modules that were done then
return the outputs that they had: those that are still needed are kept, and the others are
:class:`Dead`, tensors without memory. Operations between modules run again, on dead tensors only as
shapes. With ``again`` the sites of the level run again too, and their outputs are not kept.

A trace of one row finds what is needed: a backward slice over the operations, from those that are
still to run, which ends at the outputs of modules that are done. ``seconds`` are CPU seconds of the
sweeps, in every round, without the solves, which are the same. ``mib`` is the peak of live tensors
beyond the model and host memory. ``inputs`` counts what sites received, once for each micro-batch,
and ``inputs_differ`` what is not the same to the bit as when all rows wait on the device.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from outputs import add, result_file, rounded
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

sys.path.append(str(Path(__file__).parent / "speed"))

from models import toybox_concepts, toybox_host
from ways import forced

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.barriers import Barriers, ReplayDone
from iteris_core.activations.collect import SweepCollector
from iteris_core.activations.host_pool import HostPool, Slot
from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.memory import MemoryMeter, storage_of, tensors_in
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes import sweep as loops
from iteris_core.passes.footprint import Strategy
from iteris_core.passes.planner import IN_HOST, ON_DEVICE, Plan

FILE = result_file("memoised.json")
ROUNDS = 2
Key = tuple[int, ...]
"""A module's call: its number among the calls within its parent's call, behind the parent's key."""


class Dead(Tensor):
    """A tensor that nothing needs any more: a shape, and in operations no more than that."""

    shape_only: Tensor

    @staticmethod
    def of(tensor: Tensor, device: torch.device | None = None) -> Tensor:
        if type(tensor) is Dead:
            return tensor
        size, strides, dtype = tensor.shape, tensor.stride(), tensor.dtype
        dead = Tensor._make_wrapper_subclass(
            Dead, size, strides=strides, dtype=dtype, device=device or tensor.device
        )
        dead.shape_only = torch.empty_strided(size, strides, dtype=dtype, device="meta")
        return dead

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [t for t in tensors_in((args, kwargs)) if type(t) is Dead]
        device = (kwargs or {}).get("device") or given[0].device
        if func._schema.is_mutable and type(args[0]) is not Dead:
            raise RuntimeError(f"{func} writes a dead tensor into a live one")

        def shape(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("meta")
            if not isinstance(leaf, Tensor):
                return leaf
            return leaf.shape_only if type(leaf) is Dead else leaf.to("meta")

        made = func(*_pytree.tree_map(shape, args), **_pytree.tree_map(shape, kwargs or {}))
        if func._schema.is_mutable:
            return args[0]
        return _pytree.tree_map_only(Tensor, lambda t: Dead.of(t, torch.device(device)), made)


@dataclass
class Call:
    """A module's call in the trace, from operation ``start`` to ``stop``; ``values`` are its
    output's tensors, and ``pure`` that it wrote to none that it was given."""

    module: nn.Module
    start: int
    stop: int = sys.maxsize
    values: Sequence[int] = ()
    pure: bool = True


def kept_of(leaf: Any, live: bool, written: bool, *, as_is: bool = True) -> tuple[Any, bool]:
    """What is kept of an output, and whether operations write to it."""
    if not isinstance(leaf, Tensor):
        return leaf, False
    if not live:
        return Dead.of(leaf), False
    return leaf if as_is or not written else leaf.clone(), written


@dataclass
class Tape:
    """A forward's calls under way, each with the number of calls within it, and the outputs that
    it ``kept``; which of them are ``wanted`` at the end of the next level."""

    stack: list[Any] = field(default_factory=lambda: [[(), 0]])
    kept: dict[Key, tuple[list[Any], Any]] = field(default_factory=dict)
    wanted: Mapping[Key, Sequence[tuple[bool, bool]]] = field(default_factory=dict)

    def enter(self) -> Key:
        self.stack[-1][1] += 1
        return (*self.stack[-1][0], self.stack[-1][1])

    def keep(self, key: Key, output: Any, *, site: bool) -> None:
        """A ``site``'s output as it is, for it lacks the merged change yet."""
        leaves, tree = _pytree.tree_flatten(output)
        pairs = zip(leaves, self.wanted[key], strict=True)
        self.kept[key] = [kept_of(leaf, *flags, as_is=site) for leaf, flags in pairs], tree

    def given(self, key: Key) -> Any:
        leaves, tree = self.kept[key]
        return tree.unflatten([leaf.clone() if written else leaf for leaf, written in leaves])

    def prune(self) -> None:
        for key in self.kept.keys() - self.wanted.keys():
            del self.kept[key]
        for key, (leaves, tree) in self.kept.items():
            pairs = zip(leaves, self.wanted[key], strict=True)
            self.kept[key] = [kept_of(leaf, *flags) for (leaf, _), flags in pairs], tree


class Trace(TorchDispatchMode):
    """The operations of a forward of one row: the call around each, what it reads and makes. A
    value is a storage between two writes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Key, Call] = {}
        self._tape, self._rewritten = Tape(), dict[int, int]()
        self._ops: list[tuple[Key, set[int], set[int]]] = []
        self._values: dict[int, tuple[Any, int, int]] = {}
        self._count = 0

    def call(self, plain: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = self._tape.enter()
        call = self.calls[key] = Call(module, len(self._ops))
        self._tape.stack.append([key, 0])
        output = plain(module, *args, **kwargs)
        self._tape.stack.pop()
        self._ops.append((key, set(), set()))  # so that it ends before its parent does
        call.stop = len(self._ops)
        call.values = [
            self._value(leaf) if isinstance(leaf, Tensor) else -1
            for leaf in _pytree.tree_leaves(output)
        ]
        return output

    def _value(self, tensor: Tensor, *, new: bool = False) -> int:
        storage = storage_of(tensor)
        if storage is None:
            return -1
        ref, value, born = self._values.get(storage._cdata, (lambda: None, 0, 0))
        known = ref() is storage
        if new or not known:
            born = born if known else len(self._ops) if new else -1
            self._count += 1
            value = self._count
            self._values[storage._cdata] = weakref.ref(storage), value, born
        return value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, schema, writes = kwargs or {}, func._schema, set[int]()
        given = tensors_in((args, kwargs))
        reads, old = {self._value(t) for t in given}, {t.untyped_storage()._cdata for t in given}
        made = func(*args, **kwargs)
        for number, argument in enumerate(schema.arguments if schema.is_mutable else ()):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tensors_in(written):
                    self._rewritten[self._value(tensor)] = len(self._ops)
                    born = self._values[tensor.untyped_storage()._cdata][2]
                    for key, _ in self._tape.stack[1:]:
                        self.calls[key].pure &= born >= self.calls[key].start
                    writes.add(self._value(tensor, new=True))
        for tensor in tensors_in(made):
            writes.add(self._value(tensor, new=tensor.untyped_storage()._cdata not in old))
        # What gives no tensor, such as item(), has to run.
        self._ops.append((self._tape.stack[-1][0], reads, writes or {0}))
        return made

    def wanted(self, cut: int) -> dict[Key, list[tuple[bool, bool]]]:
        """The outermost calls that are done at operation ``cut``, and of each tensor of their
        outputs whether it is needed from there on, and whether it is written to."""
        done = {key for key, call in self.calls.items() if call.stop <= cut and call.pure}
        inside = {k: any(k[: n + 1] in done for n in range(len(k))) for k in [(), *self.calls]}
        needed = {0, *(v for key, call in self.calls.items() if len(key) == 1 for v in call.values)}
        for at, (key, reads, writes) in reversed(list(enumerate(self._ops))):
            if at >= cut or (writes & needed and not inside[key]):
                needed |= reads
        written, calls = self._rewritten, self.calls
        return {
            key: [(v in needed, written.get(v, -1) >= calls[key].stop) for v in calls[key].values]
            for key in done
            if not inside[key[:-1]]
        }


@contextmanager
def called(call: Callable[..., Any]) -> Generator[None]:
    """``call(plain, module, *args)`` stands for every module's call."""
    plain = nn.Module.__call__
    with patch.object(nn.Module, "__call__", lambda *args, **more: call(plain, *args, **more)):
        yield


class Memoised:
    """Sweeps a stage by memoised modules, in place of :meth:`Lockstep.sweep`. ``rerun`` are the
    modules that write to what they were given, which run again every time."""

    def __init__(self, *, again: bool) -> None:
        self.again, self.rerun = again, set[str]()
        self._plans: dict[str, list[tuple[Sequence[str], Any]]] = {}
        self._tape: Tape | None = None
        self._level: set[nn.Module] = set()
        self._output: Any = None

    def plan(self, lockstep: Lockstep, stage: Any, barriers: Barriers) -> None:
        trace = Trace()
        with trace, called(trace.call):
            first = MicroBatch(partial(stage.run, [0], 1), [stage.concept_ids[0]], 1)
            lockstep.run(first)
        self.rerun |= {type(c.module).__name__ for c in trace.calls.values() if not c.pure}
        where = {call.module: call for call in reversed(trace.calls.values())}
        plan: list[tuple[Sequence[str], Any]] = []
        for level in barriers.ends.values():
            calls = [where[lockstep._modules[site]] for site in level]
            plan.append((level, trace.wanted(calls[0].start if self.again else calls[-1].stop)))
        self._plans[stage.name] = [*plan, ((), {})]

    def sweep(self, lockstep: Lockstep, batches: Any, offload: Any = None) -> Iterator[Any]:
        tapes = [Tape() for _ in batches]
        with torch.no_grad(), ExitStack() as stack:
            for name in lockstep.changes:
                hook = lockstep._modules[name].register_forward_hook(self._see, prepend=True)
                stack.enter_context(hook)
            for batch in batches:
                batch.pause = self._abort
                batch.passed.update(lockstep.merged)
                stack.callback(batch.pending.clear)
            for level, wanted in self._plans.get(batches[0].stage, [((), {})]):
                self._level = {lockstep._modules[site] for site in level}
                for number, (batch, tape) in enumerate(zip(batches, tapes, strict=True)):
                    if offload is not None:
                        offload.turn(number)
                    tape.wanted, tape.stack = wanted, [[(), 0]]
                    with lockstep.active(batch), called(self._call):
                        self._run(batch, tape, level)
                    if offload is not None:
                        offload.rest()
                if not level:
                    return
                yield level
                for batch in batches:
                    batch.passed.update(level)

    def _run(self, batch: MicroBatch, tape: Tape, level: Sequence[str]) -> None:
        """The forward up to the end of ``level``, or if there is none to the model's end."""
        while batch.pending:
            batch.pending.pop()()
        if self.again and level:
            batch.until = level[-1]
        self._tape = tape
        try:
            batch.run()
        except ReplayDone:
            pass
        else:
            assert not level, f"{level} was not reached"
        finally:
            self._tape = self._output = batch.until = None
        assert batch.reached == (list(level) if self.again else []), batch.reached
        batch.reached = []
        tape.prune()

    def _abort(self, _: str) -> None:
        raise ReplayDone

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        self._output = output

    def _call(self, plain: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tape, site = self._tape, module in self._level
        if tape is None:
            return plain(module, *args, **kwargs)
        key = tape.enter()
        if key in tape.kept:
            return tape.given(key)
        if site and any(type(t) is Dead for t in tensors_in(args)):
            raise RuntimeError("a site receives a dead tensor")
        tape.stack.append([key, 0])
        try:
            output = plain(module, *args, **kwargs)
        except ReplayDone:
            if key in tape.wanted:
                tape.keep(key, self._output, site=True)
            raise
        finally:
            tape.stack.pop()
        if key in tape.wanted:
            tape.keep(key, output, site=site)
        return output


WAYS: Mapping[str, tuple[str, bool | None]] = {
    "waiting on the device": (ON_DEVICE.name, None),
    "small blocks": (f"{ON_DEVICE.name}, by small blocks", None),
    "small blocks in host memory": (f"{IN_HOST}, by small blocks", None),
    "memoised": ("by levels", False),
    "memoised in host memory": (IN_HOST, False),
    "memoised in host memory, sites again": (IN_HOST, True),
}
"""How a sweep is planned, and whether sites run again (None: not memoised)."""


class Meter(MemoryMeter):
    """Without dead tensors and those on the meta device, which have no memory."""

    def _note(self, tensor: Tensor, size: int | None) -> None:
        if type(tensor) is not Dead and tensor.device.type != "meta":
            super()._note(tensor, size)


class Pool(HostPool):
    """``peak``: the most bytes that ever waited in any."""

    live = peak = 0

    def put(self, *args: Any) -> Slot:
        slot = super().put(*args)
        self.live += slot.nbytes
        Pool.peak = max(Pool.peak, self.live)
        return slot

    def free(self, slot: Slot) -> None:
        self.live -= slot.nbytes
        super().free(slot)


class Reducing(Strategy):
    by_blocks = True  # type: ignore[assignment]  # what is observed is reduced at once


def merged(name: str, merge: Callable[[], Any], solved: dict[str, Any], *, timed: bool) -> Any:
    """A merge, its sweeps run so, without the solves of sites that are ``solved``; the others are
    added. Of every stage "seconds", or if it is not ``timed`` "mib", and digests of "inputs"."""
    (way, again), found = WAYS[name], {"seconds": {}, "mib": {}, "inputs": {}}
    memo, sweep, solve = Memoised(again=bool(again)), loops._Passes._sweep, loops._Passes._solve
    observe, Pool.peak = SweepCollector.observe, 0

    def swept(passes: Any, solver: Any, plan: Plan, batching: Any) -> None:
        if not plan.stage.sites:
            return sweep(passes, solver, plan, batching)
        if again is not None:
            memo.plan(passes._lockstep, plan.stage, plan.strategy.barriers)
        if again:
            plan = replace(plan, strategy=Reducing(**vars(plan.strategy)))
        meter, started = Meter(), time.process_time()
        with nullcontext() if timed else meter:
            sweep(passes, solver, plan, batching)
        found["seconds"][plan.stage.name] = time.process_time() - started
        found["mib"][plan.stage.name] = meter.peak / 2**20

    def known(passes: Any, solver: Any, site: str, reduction: Any) -> Any:
        if site not in solved:
            solve(passes, solver, site, reduction)
            solved[site] = passes._solutions[site]
        passes._solutions[site] = solved[site]
        return solved[site].change

    def observed(collector: Any, shown: Any) -> None:
        if not timed:
            with _disable_current_modes():  # a copy: NumPy's storages cannot be moved off
                given = shown.inputs.contiguous().clone().view(torch.uint8).numpy()
            key = shown.name, tuple(shown.choice.rows)
            found["inputs"][key] = hashlib.sha1(given).hexdigest()
        observe(collector, shown)

    with ExitStack() as stack:
        stack.enter_context(forced(way))
        for where, attribute, to in (
            (loops, "HostPool", Pool),
            (loops._Passes, "_sweep", swept),
            (loops._Passes, "_solve", known),
            (SweepCollector, "observe", observed),
            *[(Lockstep, "sweep", lambda *args: memo.sweep(*args))] * (again is not None),
        ):
            stack.enter_context(patch.object(where, attribute, to))
        merge()
    if Pool.peak:
        found["mib"]["waits in host memory"] = Pool.peak / 2**20
    if memo.rerun:
        print("modules that write to their inputs:", memo.rerun)
    return found


def compared(merge: Callable[[], Any], rounds: int) -> dict[str, Any]:
    solved, found = dict[str, Any](), dict[str, Any]()
    first = merged("waiting on the device", merge, solved, timed=False)["inputs"]
    for name in WAYS:
        made = merged(name, merge, solved, timed=False)
        assert made["inputs"].keys() == first.keys()
        differ = sum(made["inputs"][key] != digest for key, digest in first.items())
        found[name] = {"inputs": len(first), "inputs_differ": differ, "mib": made["mib"]}
        print(name, json.dumps(rounded(found[name])), flush=True)
    for _ in range(rounds):
        for name in WAYS:
            seconds = merged(name, merge, solved, timed=True)["seconds"]
            print(name, json.dumps(rounded(seconds)), flush=True)
            for stage, of in seconds.items():
                found[name].setdefault("seconds", {}).setdefault(stage, []).append(of)
    return found


def toybox() -> Callable[[], Any]:
    from toybox import TEMPLATES

    host = toybox_host()
    return merge_of(host, toybox_concepts(host, 2), 8, templates=TEMPLATES)


def flux() -> Callable[[], Any]:
    import emoji

    host = DiffusersHost(emoji.load_pipeline())
    subjects = list(emoji.subjects().values())[-2:]
    concepts = [Concept(host.read_lora(of.lora), None, of.token, of.kind) for of in subjects]
    return merge_of(host, concepts, 4)


def merge_of(
    host: Any, concepts: Sequence[Concept], samples: int, **more: Any
) -> Callable[[], Any]:
    """At two timesteps, in four micro-batches. The seed is for :mod:`emoji`'s pipeline, which takes
    no generator by its name."""
    given = Calibration(samples=samples, timesteps=2, latents="noise", **more)

    def merge() -> Any:
        torch.manual_seed(0)
        return merge_loras(host, concepts, settings={"micro_batch": samples}, calibration=given)

    return merge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="models whose name has this text")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    for name, model in {"toybox (SD)": toybox, "emoji (FLUX)": flux}.items():
        if options.only in name:
            print(name, flush=True)
            add(FILE, name, rounded(compared(model(), options.rounds)))


if __name__ == "__main__":
    main()
