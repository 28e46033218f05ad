"""Hooks on modules, and what a forward with them shows: levels of sites, and blocks to replay.

A level is a run of sites whose outputs are not read before the last of them is called, such as an
attention's query, key and value: a forward pauses once for all of them. A block is a module with a
few barriers. If blocks are replayed, a forward does not pause inside them. It runs a block from its
arguments up to the end of a level, drops the results, and waits until the level is solved. It does
this for every level before the final run of the block, so it waits with only the block's inputs.

Two forwards of one row find both. The first shows which sites' outputs are read before another site
is called, and which modules contain the sites. The second shows whether a block gives the same
output when run again, and which of its arguments it changes in place.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
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
from .tokens import Observation

_log = logging.getLogger(__name__)


@contextmanager
def hooked(
    modules: Iterable[nn.Module],
    before: Callable[[nn.Module, Any, Any], Any] | None = None,
    after: Callable[[nn.Module, Any, Any, Any], Any] | None = None,
) -> Generator[None]:
    """Context with hooks on ``modules``: ``before(module, args, kwargs)``, ahead of other hooks,
    and ``after(module, args, kwargs, output)``. What they return is used instead, unless None."""
    with ExitStack() as stack:
        for module in modules:
            if before is not None:
                handle = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
                stack.enter_context(handle)
            if after is not None:
                stack.enter_context(module.register_forward_hook(after, with_kwargs=True))
        yield


@dataclass(frozen=True)
class Barriers:
    """``ends`` maps the last site of every level to its sites in order; a site in no level is its
    own level. ``blocks`` are replayed: each with the last sites of its levels, in order.
    ``written`` are the arguments that a block changes in place, as paths in (args, kwargs)."""

    ends: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    blocks: Mapping[nn.Module, Sequence[str]] = field(default_factory=dict[nn.Module, Any])
    written: Mapping[nn.Module, Set[str]] = field(default_factory=dict[nn.Module, Any])

    @cached_property
    def _inner(self) -> frozenset[str]:
        return frozenset(site for level in self.ends.values() for site in level[:-1])

    def ends_at(self, site: str) -> bool:
        return site not in self._inner

    def level(self, last: str) -> Sequence[str]:
        return self.ends.get(last, (last,))


class ExecutionTrace(TorchDispatchMode):
    """Context of a forward of one row that is to :meth:`observe` its sites: ``sites`` in order,
    those ``joined`` to the next one, because no operation reads an output between the two, and the
    modules ``inside`` which each is called, outermost first. ``calls`` counts each module's calls;
    ``device`` is that of the sites' inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.sites: list[str] = []
        self.joined: set[str] = set()
        self.inside: dict[str, tuple[nn.Module, ...]] = {}
        self.calls: Counter[nn.Module] = Counter()
        self.device = torch.device("cpu")
        self._modules: list[nn.Module] = []
        self._outputs: dict[int, Tensor] = {}
        self._received: list[tuple[Tensor, int | None]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> ExecutionTrace:
        thread = threading.get_ident()  # hooks are process-wide, and other merges may be running

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:
                self.calls[module] += 1
                self._modules.append(module)

        def leave(*_: Any) -> None:
            if threading.get_ident() == thread:
                self._modules.pop()

        self._hooks.enter_context(register_module_forward_hook(leave, always_call=True))
        self._hooks.enter_context(register_module_forward_pre_hook(enter))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.close()
        self._end_level()
        super().__exit__(*error)

    def observe(self, shown: Observation) -> None:
        self.device = shown.inputs.device
        changed = any(version_of(tensor) != version for tensor, version in self._received)
        new = shown.name not in self.inside
        if self._outputs and not changed and new:
            self.joined.add(self.sites[-1])
        else:
            self._end_level()
        if new:
            self.sites.append(shown.name)
            self.inside[shown.name] = tuple(self._modules)
        self._outputs[shown.outputs.untyped_storage()._cdata] = shown.outputs
        for tensor in (shown.inputs, shown.stream):
            if tensor is not None:
                self._received.append((tensor, version_of(tensor)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self._outputs.keys() & _storages((args, kwargs))
        result = func(*args, **(kwargs or {}))
        returned = _storages(result) if read else set[int | None]()
        is_view = not func._schema.is_mutable and returned and read >= returned
        if read and not is_view:
            self._end_level()
        return result

    def _end_level(self) -> None:
        """An output was read or changed: the level ends with the last site."""
        self._outputs.clear()
        self._received.clear()

    def barriers(self, most: int = 0) -> Barriers:
        """Barriers with blocks: the largest modules that are called once and have 2 to ``most``
        barriers. A level ends where a block ends."""
        barriers = [site for site in self.sites if site not in self.joined]
        count = Counter(module for site in barriers for module in self.inside[site])
        around = ((site, module) for site in self.sites for module in reversed(self.inside[site]))
        blocks = {s: m for s, m in around if 2 <= count[m] <= most and self.calls[m] == 1}
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
        return Barriers(ends, lasts)


def with_replayable(barriers: Barriers, run: Callable[[], None], most: float) -> Barriers:
    """``barriers`` with the blocks whose replay reproduces their output within ``most``, and the
    arguments that they write to. ``run`` is a forward of one row; every block runs on copies of its
    arguments before the real run."""
    blocks: dict[nn.Module, Sequence[str]] = {}
    written: dict[nn.Module, Set[str]] = {}
    entered: dict[nn.Module, tuple[Any, dict[str, tuple[Tensor, int | None]]]] = {}
    replaying = False

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal replaying
        if replaying:
            return
        replaying, arguments = True, tensors((args, kwargs))
        copies = unwritten(arguments.keys(), args, kwargs)
        try:
            output = module(*copies[0], **copies[1])
            versions = {path: (leaf, version_of(leaf)) for path, leaf in arguments.items()}
            entered[module] = output, versions
        except Exception:  # only the trial's error: a failing site fails again in the forward
            _log.debug("%s cannot be replayed", type(module).__name__, exc_info=True)
        finally:
            replaying = False

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if replaying or module not in entered:
            return
        replayed, versions = entered.pop(module)
        if alike(_pytree.tree_leaves(replayed), _pytree.tree_leaves(output), most):
            blocks[module] = barriers.blocks[module]
            written[module] = frozenset(
                path
                for path, (leaf, version) in versions.items()
                if leaf.is_inference() or version_of(leaf) != version
            )

    with hooked(barriers.blocks, before, after):
        run()
    return Barriers(barriers.ends, blocks, written)


def unwritten(written: Set[str], *arguments: Any) -> Any:
    """``arguments`` with copies of tensors that a block will change in place, and of lists and
    dictionaries, which it may extend."""

    def copied(path: Any, leaf: Any) -> Any:
        return leaf.clone() if _pytree.keystr(path) in written else leaf

    return _pytree.tree_map_with_path(copied, arguments)


def tensors(tree: Any) -> dict[str, Tensor]:
    """The tensors among the leaves of ``tree``, by their path."""
    leaves, _ = _pytree.tree_flatten_with_path(tree)
    return {_pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def alike(values: Sequence[Any], others: Sequence[Any], most: float) -> bool:
    """True if tensors equal the ``others``, because kernels may round differently when run again:
    each within ``most`` of its norm, and in half precision within eight units of rounding. Only
    tensors are compared."""
    if len(values) != len(others):
        return False
    for a, b in zip(values, others, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.shape != b.shape:
                return False
            rounding = 8 * torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0
            error = float((a.float() - b.to(a.device).float()).norm())
            if not error <= max(most, rounding) * float(b.float().norm()):  # Or it is no number.
                return False
    return True


def version_of(tensor: Tensor) -> int | None:
    """The number of in-place changes; inference tensors do not count them."""
    return None if tensor.is_inference() else tensor._version


def _storages(tree: Any) -> set[int | None]:
    """The storages of the tensors; None for tensors without one."""
    storages = map(storage_of, tensors_in(tree))
    return {None if storage is None else storage._cdata for storage in storages}
