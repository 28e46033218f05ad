"""Parts of a model that can run on their own: their inputs, and their outputs under each LoRA
alone.

A segment is a module with a substantial part of a stage's sites, such as a transformer block or a
UNet level. It runs many times on inputs that were recorded once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree

from ..activations.barriers import ExecutionTrace, alike, tensors
from ..activations.conditions import Condition
from ..activations.lockstep import Lockstep
from ..activations.memory import is_out_of_memory, tensors_in
from ..activations.micro_batch import MicroBatch
from ..activations.site import site_of
from ..solve.choose import Thresholds

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """``sites`` in execution order."""

    module: nn.Module
    sites: Sequence[str]


@dataclass(frozen=True)
class _Kept:
    """A tensor in host memory, and the device on which it is needed."""

    tensor: Tensor
    device: torch.device


@dataclass(frozen=True)
class SegmentBatch:
    """One micro-batch of merged rows through a segment, in host memory.

    ``owners`` are the concepts of each row; an image may show several. ``given`` are the arguments,
    (args, kwargs); ``wanted`` are the target tensors, (rows, …), and ``found`` the actual ones.
    """

    owners: Sequence[Sequence[int]]
    rows: Sequence[int]
    given: Any
    wanted: Sequence[Tensor]
    found: Sequence[Tensor]
    conditions: Sequence[Condition] = ()

    @property
    def bytes(self) -> int:
        given = (leaf for leaf in _pytree.tree_leaves(self.given) if isinstance(leaf, _Kept))
        tensors = [*self.wanted, *self.found, *(leaf.tensor for leaf in given)]
        return sum(tensor.nbytes for tensor in tensors)

    def arguments(self) -> Any:
        """Copies of ``given`` on their original devices; the segment may change them in place."""

        def ready(leaf: Any) -> Any:
            return leaf.tensor.to(leaf.device, copy=True) if isinstance(leaf, _Kept) else leaf

        return _pytree.tree_map(ready, self.given)


class _Passed(BaseException):
    """Raised to leave a forward once the segment has run."""


def segments_of(found: ExecutionTrace, share: float) -> list[Segment]:
    """The largest modules that are called once and contain two or more sites, but at most that
    ``share`` of all; in execution order. Some sites may be in no segment."""
    parts: dict[nn.Module, list[str]] = {}
    for site, module in found.modules(found.sites, share * len(found.sites)).items():
        parts.setdefault(module, []).append(site)
    return [Segment(module, sites) for module, sites in parts.items()]


@dataclass(frozen=True)
class ByRow:
    """The arguments of a segment with an entry per row, by path, and the indices of such tensors
    among its outputs."""

    given: Mapping[str, bool]
    outputs: Sequence[int]

    @classmethod
    def of(cls, segment: Segment, lockstep: Lockstep, batch: MicroBatch) -> ByRow:
        """``batch`` has one row, in two copies; only unrelated data such as two tokens could have
        that length too."""
        given, outputs = _passed(segment, lockstep, batch, lambda path, leaf: leaf)
        return cls(
            {path: _has_length(leaf, 2) for path, leaf in tensors(given).items()},
            [i for i, leaf in enumerate(outputs) if _has_length(leaf, 2)],
        )

    def has(self, path: str, leaf: Tensor, rows: int) -> bool:
        """True if an argument has an entry for each of that many rows. An argument that a single
        row lacks, such as a padding mask, is recognised by its length."""
        return self.given.get(path, _has_length(leaf, rows))

    def outputs_of(self, output: Any) -> list[Tensor]:
        every = tensors_in(output)
        return [every[number] for number in self.outputs]


def pass_through(
    segment: Segment, lockstep: Lockstep, batch: MicroBatch, rows: Sequence[int], by_row: ByRow
) -> SegmentBatch:
    """Run ``batch`` up to the end of the segment as merged rows. With two copies, the same rows run
    first under each row's own LoRA, which gives the targets."""
    count = len(batch.owners) * (batch.copies - 1)
    every = len(batch.owners) * batch.copies

    def kept(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        some = leaf[count:] if by_row.has(_pytree.keystr(path), leaf, every) else leaf
        return _Kept(some.to("cpu", copy=True), leaf.device)

    given, output = _passed(segment, lockstep, batch, kept)
    outputs = by_row.outputs_of(output)
    return SegmentBatch(
        [[owner] for owner in batch.owners],
        rows,
        given,
        [leaf[:count] for leaf in outputs],
        [leaf[count:] for leaf in outputs],
        batch.conditions,
    )


def within(batches: Iterable[SegmentBatch], most_bytes: int, least: int) -> list[SegmentBatch]:
    """As many of ``batches`` as fit into host memory, but at least ``least``."""
    found: list[SegmentBatch] = []
    taken = 0
    for batch in batches:
        found.append(batch)
        taken += batch.bytes
        if taken + batch.bytes > most_bytes and len(found) >= least:
            break
    return found


def outputs_of(
    segment: Segment, lockstep: Lockstep, batch: MicroBatch, by_row: ByRow
) -> list[Tensor]:
    """The segment's outputs by row for ``batch``, in host memory."""
    _, output = _passed(segment, lockstep, batch, lambda path, leaf: None)
    return by_row.outputs_of(output)


def _passed(
    segment: Segment, lockstep: Lockstep, batch: MicroBatch, kept: Callable[[Any, Any], Any]
) -> tuple[Any, Sequence[Tensor]]:
    """The ``kept`` arguments by path, which the segment may change in place, and its output tensors
    in host memory."""
    seen: dict[str, Any] = {}

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen["given"] = _pytree.tree_map_with_path(kept, (args, kwargs))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        seen["outputs"] = [leaf.detach().cpu() for leaf in tensors_in(output)]
        raise _Passed

    entering = segment.module.register_forward_pre_hook(enter, with_kwargs=True)
    with entering, segment.module.register_forward_hook(leave), suppress(_Passed):
        lockstep.run(batch)
    return seen["given"], seen["outputs"]


def _has_length(leaf: Tensor, length: int) -> bool:
    return bool(leaf.ndim) and leaf.shape[0] == length


@contextmanager
def plain_weights(module: nn.Module) -> Generator[Mapping[str, Tensor]]:
    """Copies of the module's weights that were loaded in inference mode, through which gradients
    cannot pass; for :func:`torch.func.functional_call`. Gradients work within the context."""
    with torch.inference_mode(False), torch.enable_grad():
        named = [*module.named_parameters(), *module.named_buffers()]
        yield {name: value.detach().clone() for name, value in named if value.is_inference()}


@dataclass(frozen=True)
class SegmentForward:
    """Runs a segment on merged rows only."""

    lockstep: Lockstep
    segment: Segment
    weights: Mapping[str, Tensor]
    by_row: ByRow

    def __call__(self, passage: SegmentBatch) -> Sequence[Tensor]:
        outputs: list[Tensor] = []
        args, kwargs = passage.arguments()

        def run() -> None:
            output = functional_call(self.segment.module, dict(self.weights), args, kwargs)
            outputs.extend(self.by_row.outputs_of(output))

        owners = [first for first, *_ in passage.owners]
        batch = MicroBatch(run, owners, 1, merged_only=True, conditions=passage.conditions)
        self.lockstep.run(batch, grad=torch.is_grad_enabled())
        return outputs


def sample_inputs(
    runner: SegmentForward,
    modules: Mapping[str, nn.Module],
    passages: Sequence[SegmentBatch],
    thresholds: Thresholds,
) -> dict[str, Tensor] | None:
    """Sampled inputs of every site in the segment, (tokens, in); None if the segment by itself does
    not reproduce its output within the model."""
    tokens: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    each = -(-thresholds.polish_tokens // len(passages))

    def noting(site: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            shown = site_of(site, module).tokens(args[0].detach())
            # At random: every n-th token of a row may lie in one column of the image.
            some = torch.randperm(len(shown), generator=generator)[:each]
            tokens.setdefault(site, []).append(shown[some.to(shown.device)].float())

        return note

    with torch.no_grad(), ExitStack() as stack:
        for site in runner.segment.sites:
            stack.enter_context(modules[site].register_forward_pre_hook(noting(site)))
        try:
            for passage in passages:
                found = runner(passage)
                if not found or not alike(found, passage.found, thresholds.segment_error):
                    return None
        except Exception as error:  # a row's share of an argument may be unknown
            if is_out_of_memory(error):
                raise
            _log.debug("%s cannot run by itself", runner.segment.sites[0], exc_info=True)
            return None
    return {site: torch.cat(some) for site, some in tokens.items()}
