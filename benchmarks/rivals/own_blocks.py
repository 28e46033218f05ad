"""Makes reference rows enter every block of a model with the merged rows' inputs.

Within a block, such as a transformer layer or a UNet's residual block, they then run under each
LoRA's own changes, on the output of the merged blocks before it. A block is the smallest entry in a
list of similar modules that contains two or more sites; a site outside all blocks is its own block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.activations.trace import ExecutionTrace, tensors
from iteris_core.hosts.protocol import Stage
from iteris_core.passes.job import Run
from iteris_core.passes.planner import find

_Rows = dict[nn.Module, Set[str]]
"""Block → paths, in (args, kwargs), of its arguments with an entry per row."""


class OwnBlocks:
    """Hooks on the blocks of every stage that is :meth:`entered`; a context manager that removes
    them."""

    def __init__(self, run: Run) -> None:
        self._modules, self._lockstep = run.job.host.sites(), run.lockstep
        self._stages: set[str] = set()
        self._hooks = ExitStack()

    def __enter__(self) -> OwnBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def entered(self, stage: Stage) -> None:
        """Put the hooks on a stage's blocks; runs its first row."""
        if stage.name in self._stages or not stage.sites:
            return
        self._stages.add(stage.name)
        blocks = blocks_of(find(stage, self._lockstep), self._modules)
        rows = _by_row(blocks, stage, self._lockstep)

        def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
            batch = self._lockstep._active
            if batch is None or batch.copies == 1:
                return None
            return _as_merged(rows.get(module, frozenset()), len(batch.rows), (args, kwargs))

        for block in blocks:
            hook = block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
            self._hooks.enter_context(hook)


def blocks_of(found: ExecutionTrace, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The blocks in a forward, and the sites (``modules``) outside all blocks."""
    count = Counter(module for site in found.sites for module in found.inside[site])
    of_site = {site: _smallest(found.inside[site], count) for site in found.sites}
    outer = {
        module
        for site, block in of_site.items()
        for module in found.inside[site]
        if block is not None and module is not block
    }
    parts = (
        modules[site] if block is None or block in outer else block
        for site, block in of_site.items()
    )
    return list(dict.fromkeys(parts))


def _smallest(inside: Sequence[nn.Module], count: Mapping[nn.Module, int]) -> nn.Module | None:
    """The smallest possible block among the modules around a site, outermost first."""
    entries = {entry for module in inside for entry in _entries(module)}
    return next((m for m in reversed(inside) if m in entries and count[m] > 1), None)


def _entries(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.children():
        if isinstance(part, nn.ModuleList) and len({type(entry) for entry in part}) == 1:
            yield from part


def _by_row(blocks: Sequence[nn.Module], stage: Stage, lockstep: Lockstep) -> _Rows:
    """The row-wise arguments, found with two copies of the first row."""
    rows: _Rows = {}

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = tensors((args, kwargs)).items()
        rows[module] = {path for path, leaf in given if leaf.ndim and leaf.shape[0] == 2}

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        first = stage.rows[:1]
        lockstep.run(MicroBatch(lambda: stage.forward(first, 2), first, 2))
    return rows


def _as_merged(paths: Set[str], rows: int, given: Any) -> Any:
    """``given``, with the first half of these tensors replaced by the second, the merged rows."""

    def same(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or _pytree.keystr(path) not in paths:
            return leaf
        if leaf.shape[0] != 2 * rows or torch.equal(leaf[:rows], leaf[rows:]):
            return leaf  # sites that receive the same tensor share its moments
        return torch.cat([leaf[rows:], leaf[rows:]])

    return _pytree.tree_map_with_path(same, given)
