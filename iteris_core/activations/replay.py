"""Levels of sites that are solved together, and blocks that are replayed.

A level is a run of sites whose outputs are not read before the last of them is called, such as an
attention's query, key and value: a forward pauses once for all of them. A block is a module with a
few barriers. If blocks are replayed, a forward does not pause inside them. It runs a block from its
arguments up to the end of a level, drops the results, and waits until the level is solved. It does
this for every level before the final run of the block, so it waits with only the block's inputs.
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
            if last not in batch.passed:
                _replay(batch, module, unwritten(block.written, args, kwargs), last)
                batch.wait(barriers.level(last))

    return hook


def _replay(batch: MicroBatch, module: nn.Module, given: Any, last: str) -> None:
    kept = dict(batch.kept)
    batch.until = last
    try:
        module(*given[0], **given[1])
    except ReplayDone:
        return
    finally:
        batch.until = None
        batch.kept = kept
    batch.reached.append(f"no {last}")  # waiting for it then raises the error


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
