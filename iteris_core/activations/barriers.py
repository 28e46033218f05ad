"""Levels of sites that are solved together, and blocks that are replayed.

A level is a run of sites whose outputs are not read before the last of them is called, such as an
attention's query, key and value: a forward pauses once for all of them. A block is a module with a
few barriers. If blocks are replayed, a forward does not pause inside them. It runs a block from its
arguments up to the end of a level, drops the results, and waits until the level is solved. It does
this for every level before the final run of the block, so it waits with only the block's inputs.

Watching two forwards of one row finds both. The first shows which sites' outputs are read before
another site is called, and which modules contain the sites. The second shows whether a block gives
the same output when run again, and which of its arguments it changes in place.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .memory import storage_of, tensors_in
from .micro_batch import MicroBatch, version_of
from .tokens import Observation

_log = logging.getLogger(__name__)

Run = Callable[[MicroBatch], None]


class ReplayDone(BaseException):
    """Raised to leave a replay once the level has been observed."""


@dataclass(frozen=True)
class Block:
    """The last sites of a module's barriers, in order. ``written`` are the arguments that it
    changes in place, as paths in (args, kwargs)."""

    ends: Sequence[str]
    written: Set[str] = frozenset()


@dataclass(frozen=True)
class Barriers:
    """``ends`` maps the last site of every level to its sites in order; ``blocks`` are those that
    are replayed. A site in no level is its own level."""

    ends: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    blocks: Mapping[nn.Module, Block] = field(default_factory=dict[nn.Module, Block])

    @cached_property
    def _inner(self) -> frozenset[str]:
        return frozenset(site for level in self.ends.values() for site in level[:-1])

    def ends_at(self, site: str) -> bool:
        return site not in self._inner

    def level(self, last: str) -> Sequence[str]:
        return self.ends.get(last, (last,))


def replay_hook(
    barriers: Barriers, active: Callable[[], MicroBatch | None]
) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A pre-hook for every block, in which the active forward waits until the block's sites are
    solved, level by level."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = active()
        if batch is None or batch.pause is None or batch.until is not None:
            return
        block = barriers.blocks[module]
        for last in block.ends:
            if last in batch.passed:
                continue
            given, kept = unwritten(block.written, args, kwargs), dict(batch.kept)
            batch.until = last
            try:
                module(*given[0], **given[1])
                batch.reached.append(f"no {last}")  # waiting for it then raises the error
            except ReplayDone:
                pass
            finally:
                batch.until, batch.kept = None, kept
            del given
            batch.wait(barriers.level(last))

    return hook


def unwritten(written: Set[str], *given: Any) -> Any:
    """``given`` with copies of tensors that a block will change in place, and of lists and
    dictionaries, which it may extend."""

    def copied(path: Any, leaf: Any) -> Any:
        return leaf.clone() if _pytree.keystr(path) in written else leaf

    return _pytree.tree_map_with_path(copied, given)


def tensors(given: Any) -> dict[str, Tensor]:
    """The tensors among the leaves of ``given``, by their path."""
    leaves, _ = _pytree.tree_flatten_with_path(given)
    return {_pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


@dataclass
class ExecutionTrace:
    """The barriers found in the first forward: ``sites`` in order, those ``joined`` to the next
    one, and the modules around each call, outermost first. ``device`` is the device of their
    inputs."""

    sites: list[str] = field(default_factory=list[str])
    joined: set[str] = field(default_factory=set[str])
    inside: dict[str, tuple[nn.Module, ...]] = field(default_factory=dict[str, Any])
    calls: Counter[nn.Module] = field(default_factory=Counter[nn.Module])
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def barriers(self, most: int = 0) -> Barriers:
        """Barriers with blocks: the largest modules with 2 to ``most`` barriers. A level ends where
        a block ends."""
        blocks = self.modules([site for site in self.sites if site not in self.joined], most)
        ends: dict[str, Sequence[str]] = {}
        level: list[str] = []
        lasts: dict[nn.Module, list[str]] = {}
        for number, site in enumerate(self.sites):
            level.append(site)
            block = blocks.get(site)
            if site in self.joined and blocks.get(self.sites[number + 1]) is block:
                continue
            ends[site] = tuple(level)
            if block is not None:
                lasts.setdefault(block, []).append(site)
            level = []
        return Barriers(ends, {block: Block(tuple(some)) for block, some in lasts.items()})

    def modules(self, counted: Sequence[str], most: int) -> dict[str, nn.Module]:
        """Site → the largest module around it that is called once and has 2 to ``most`` of the
        ``counted`` sites; sites without one are omitted."""
        count = Counter(module for site in counted for module in self.inside[site])
        every = ((site, module) for site in self.sites for module in reversed(self.inside[site]))
        return {s: m for s, m in every if 2 <= count[m] <= most and self.calls[m] == 1}


def watched(run: Run, batch: MicroBatch) -> ExecutionTrace:
    """The barriers of a forward of one row."""
    batch.observer = watch = _Watch()
    with watch, watch.modules():
        run(batch)
    return watch.found


class _Watch(TorchDispatchMode):
    """Observes every operation between one site and the next."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ExecutionTrace()
        self._outputs: dict[int, Tensor] = {}
        self._given: list[tuple[Tensor, int | None]] = []
        self._inside: list[nn.Module] = []

    @contextmanager
    def modules(self) -> Generator[None]:
        """Record the modules that this thread calls; the hooks are process-wide, and other merges
        may be running."""
        mine = threading.get_ident()

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == mine:
                self.found.calls[module] += 1
                self._inside.append(module)

        def leave(*_: Any) -> None:
            if threading.get_ident() == mine:
                self._inside.pop()

        leaving = register_module_forward_hook(leave, always_call=True)
        with register_module_forward_pre_hook(enter), leaving:
            yield

    def observe(self, shown: Observation) -> None:
        found = self.found
        found.device = shown.inputs.device
        changed = any(version_of(tensor) != version for tensor, version in self._given)
        new = shown.name not in found.inside
        if self._outputs and not changed and new:
            found.joined.add(found.sites[-1])
        else:
            self._begin()
        if new:
            found.sites.append(shown.name)
            found.inside[shown.name] = tuple(self._inside)
        self._outputs[shown.outputs.untyped_storage()._cdata] = shown.outputs
        for tensor in (shown.inputs, shown.stream):
            if tensor is not None:
                self._given.append((tensor, version_of(tensor)))

    def _begin(self) -> None:
        """Record that an output was read or changed: the level ends with the last site."""
        self._outputs.clear()
        self._given.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = self._outputs.keys() & _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        made = _storages(result) if asked else set[int | None]()
        is_view = not func._schema.is_mutable and made and asked >= made
        if asked and not is_view:
            self._begin()
        return result


def _storages(tree: Any) -> set[int | None]:
    """The storages of the tensors; None for tensors without one."""
    found = map(storage_of, tensors_in(tree))
    return {None if storage is None else storage._cdata for storage in found}


def with_replayable(barriers: Barriers, run: Run, batch: MicroBatch, most: float) -> Barriers:
    """``barriers`` with the blocks whose replay reproduces their output within ``most``, and the
    arguments that they write to. ``batch`` has one row; every block runs on copies of its arguments
    before the real run."""
    blocks: dict[nn.Module, Block] = {}
    entered: dict[nn.Module, tuple[Any, dict[str, tuple[Tensor, int | None]]]] = {}
    trying: list[nn.Module] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if trying:
            return
        trying.append(module)
        there = tensors((args, kwargs))
        given = unwritten(there.keys(), args, kwargs)
        try:
            again = module(*given[0], **given[1])
            entered[module] = again, {path: (t, version_of(t)) for path, t in there.items()}
        except Exception:  # only the trial's error: a failing site fails again in the forward
            _log.debug("%s cannot be replayed", type(module).__name__, exc_info=True)
        finally:
            trying.pop()

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if trying or module not in entered:
            return
        again, there = entered.pop(module)
        written = {
            path for path, (t, was) in there.items() if t.is_inference() or version_of(t) != was
        }
        if alike(_pytree.tree_leaves(again), _pytree.tree_leaves(output), most):
            blocks[module] = Block(barriers.blocks[module].ends, frozenset(written))

    with ExitStack() as stack:
        for module in barriers.blocks:
            entering = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            stack.enter_context(entering)
            stack.enter_context(module.register_forward_hook(after, with_kwargs=True))
        run(batch)
    return Barriers(barriers.ends, blocks)


def alike(some: Sequence[Any], others: Sequence[Any], most: float) -> bool:
    """True if ``some`` tensors equal the ``others``, each within ``most`` of its norm, because
    kernels may round differently when run again. Only tensors are compared."""
    return len(some) == len(others) and all(
        a.shape == b.shape
        and float((a.float() - b.to(a.device).float()).norm()) <= most * float(b.float().norm())
        for a, b in zip(some, others, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )
