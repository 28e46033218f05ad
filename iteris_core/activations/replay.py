"""Barriers of sites that are solved together, and blocks that are replayed.

A level is a run of sites none of whose outputs is read before the last of them is called, such as
the query, key and value of an attention: a forward pauses once for all. A block is a module of a
few barriers. Where blocks are replayed a forward pauses at no site within: it runs a block from its
arguments up to the end of a level, drops what it made, waits until the level is solved, and does so
for every level, before it runs the block for good. So it waits with what enters the block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree

from .micro_batch import MicroBatch


class ReplayDone(BaseException):
    """Leaves a replay once the level has been shown."""


@dataclass(frozen=True)
class Block:
    """The last sites of a module's barriers, in order. ``written`` are those of its arguments, as
    paths in (args, kwargs), that it changes in place."""

    ends: Sequence[str]
    written: Set[str] = frozenset()


@dataclass(frozen=True)
class Barriers:
    """``ends`` has the sites of every level, in order, by the last one; ``blocks`` are those that
    are replayed. A site that is in no level is one of its own."""

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
    """A pre-hook of every block: the active forward waits in it until the block's sites are solved,
    level by level."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = active()
        if batch is None or batch.pause is None or batch.until is not None:
            return
        block = barriers.blocks[module]
        for last in block.ends:
            if last not in batch.passed:
                _replay(batch, module, unwritten(block.written, args, kwargs), last)
                batch.wait(barriers.level(last))

    return hook


def _replay(batch: MicroBatch, module: nn.Module, given: Any, last: str) -> None:
    streams = dict(batch.streams)
    batch.until = last
    try:
        module(*given[0], **given[1])
    except ReplayDone:
        return
    finally:
        batch.until = None
        batch.streams = streams
    batch.reached.append(f"no {last}")  # which waiting for it complains of


def unwritten(written: Set[str], *given: Any) -> Any:
    """``given`` with copies of the tensors that a block will change in place, and of lists and
    dictionaries, to which it may add."""

    def copied(path: Any, leaf: Any) -> Any:
        return leaf.clone() if _pytree.keystr(path) in written else leaf

    return _pytree.tree_map_with_path(copied, given)


def tensors(given: Any) -> dict[str, Tensor]:
    """The tensors among the leaves of ``given``, by their path."""
    leaves, _ = _pytree.tree_flatten_with_path(given)
    return {_pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}
