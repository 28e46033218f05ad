"""Parts of a model that run by themselves, on inputs that were recorded once: a segment is a
module with a substantial part of a stage's sites, such as a transformer block or a UNet level."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree

from ..activations.barriers import ExecutionTrace, alike, tensors
from ..activations.lockstep import Lockstep
from ..activations.memory import is_out_of_memory, tensors_in
from ..activations.micro_batch import MicroBatch
from ..activations.site import Condition, site_of
from ..solve.choose import Thresholds

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """``sites`` in execution order."""

    module: nn.Module
    sites: Sequence[str]


def segments_of(found: ExecutionTrace, share: float) -> list[Segment]:
    """The largest modules that are called once and contain two or more sites, but at most that
    ``share`` of all; in execution order. Some sites may be in no segment."""
    parts: dict[nn.Module, list[str]] = {}
    for site, module in found.modules(found.sites, share * len(found.sites)).items():
        parts.setdefault(module, []).append(site)
    return [Segment(module, sites) for module, sites in parts.items()]


class NotPolished(Exception):
    """Why a segment stays as it is; the message follows "are not polished, "."""


@dataclass(frozen=True)
class _Kept:
    """A tensor in host memory, and the device on which it is needed."""

    tensor: Tensor
    device: torch.device


@dataclass(frozen=True)
class SegmentBatch:
    """One micro-batch of merged rows through a segment, in host memory. ``owners`` are the rows'
    concepts. ``given`` are the arguments, (args, kwargs); ``wanted`` are the target tensors,
    (rows, …), and ``found`` the actual ones."""

    owners: Sequence[int]
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


class _Passed(BaseException):
    """Raised to leave a forward once the segment has run."""


class SegmentRunner:
    """Runs ``segment`` in forwards of the whole model, which stop at its end, and by itself."""

    def __init__(self, segment: Segment, lockstep: Lockstep, batch: MicroBatch) -> None:
        """``batch`` has one row, in two copies: arguments and outputs of length 2 have an entry per
        row. Only unrelated data such as two tokens could have that length too."""
        self.segment, self._lockstep = segment, lockstep
        self._copied: dict[str, Tensor] = {}
        given, outputs = self._passed(batch, lambda path, leaf: leaf)
        self._by_row = {path: leaf.shape[:1] == (2,) for path, leaf in tensors(given).items()}
        self._outputs = [i for i, leaf in enumerate(outputs) if leaf.shape[:1] == (2,)]

    def record(self, batch: MicroBatch, rows: Sequence[int]) -> SegmentBatch:
        """Run ``batch``, two copies of ``rows``, up to the end of the segment: first under each
        row's own LoRA, which gives the targets, then as merged rows."""
        count = len(batch.owners)

        def kept(path: Any, leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            # An argument that a single row lacks, such as a padding mask, is recognised by length.
            by_row = self._by_row.get(_pytree.keystr(path), leaf.shape[:1] == (2 * count,))
            return _Kept((leaf[count:] if by_row else leaf).to("cpu", copy=True), leaf.device)

        given, outputs = self._passed(batch, kept)
        some = [outputs[number] for number in self._outputs]
        wanted, found = [leaf[:count] for leaf in some], [leaf[count:] for leaf in some]
        return SegmentBatch(batch.owners, rows, given, wanted, found, batch.conditions)

    def _passed(
        self, batch: MicroBatch, kept: Callable[[Any, Any], Any]
    ) -> tuple[Any, Sequence[Tensor]]:
        """The ``kept`` arguments by path, which the segment may change in place, and its output
        tensors in host memory."""
        seen: dict[str, Any] = {}

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen["given"] = _pytree.tree_map_with_path(kept, (args, kwargs))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            seen["outputs"] = [leaf.detach().cpu() for leaf in tensors_in(output)]
            raise _Passed

        module = self.segment.module
        entering = module.register_forward_pre_hook(enter, with_kwargs=True)
        with entering, module.register_forward_hook(leave), suppress(_Passed):
            self._lockstep.run(batch)
        return seen["given"], seen["outputs"]

    @contextmanager
    def gradients(self) -> Generator[None]:
        """Context in which gradients pass through the segment by itself: weights that were loaded
        in inference mode, through which they cannot, are replaced by copies."""
        module = self.segment.module
        with torch.inference_mode(False), torch.enable_grad():
            named = [*module.named_parameters(), *module.named_buffers()]
            self._copied = {n: value.detach().clone() for n, value in named if value.is_inference()}
            try:
                yield
            finally:
                self._copied = {}

    def __call__(self, batch: SegmentBatch) -> Sequence[Tensor]:
        """The outputs by row of the segment by itself, on merged rows only."""
        outputs: list[Tensor] = []

        def ready(leaf: Any) -> Any:  # a copy: the segment may change it in place
            return leaf.tensor.to(leaf.device, copy=True) if isinstance(leaf, _Kept) else leaf

        args, kwargs = _pytree.tree_map(ready, batch.given)

        def run() -> None:
            every = tensors_in(functional_call(self.segment.module, self._copied, args, kwargs))
            outputs.extend(every[number] for number in self._outputs)

        merged = MicroBatch(run, batch.owners, 1, merged_only=True, conditions=batch.conditions)
        self._lockstep.run(merged, grad=torch.is_grad_enabled())
        return outputs

    def sample_inputs(
        self,
        modules: Mapping[str, nn.Module],
        batches: Sequence[SegmentBatch],
        thresholds: Thresholds,
    ) -> dict[str, Tensor]:
        """Sampled inputs of every site in the segment, (tokens, in). Raises :class:`NotPolished`
        if the segment by itself does not give its output within the model."""
        tokens: dict[str, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(0)
        each = -(-thresholds.polish_tokens // len(batches))

        def noting(site: str) -> Callable[..., None]:
            def note(module: nn.Module, args: tuple[Any, ...]) -> None:
                shown = site_of(site, module).tokens(args[0].detach())
                # At random: every n-th token of a row may lie in one column of the image.
                some = torch.randperm(len(shown), generator=generator)[:each]
                tokens.setdefault(site, []).append(shown[some.to(shown.device)].float())

            return note

        differs = NotPolished("because they give a different result when run by themselves")
        with torch.no_grad(), ExitStack() as stack:
            for site in self.segment.sites:
                stack.enter_context(modules[site].register_forward_pre_hook(noting(site)))
            try:
                for batch in batches:
                    found = self(batch)
                    if not found or not alike(found, batch.found, thresholds.segment_error):
                        raise differs
            except Exception as error:  # a row's share of an argument may be unknown
                if is_out_of_memory(error) or error is differs:
                    raise
                _log.debug("%s cannot run by itself", self.segment.sites[0], exc_info=True)
                raise differs from error
        return {site: torch.cat(some) for site, some in tokens.items()}
