"""A segment run on what entered it once, for the polish of blocks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..activations.barriers import alike
from ..activations.lockstep import Lockstep
from ..activations.meter import is_out_of_memory
from ..activations.micro_batch import MicroBatch
from ..activations.segments import ByRow, Segment, SegmentBatch
from ..activations.site import site_of
from ..solve.choose import Policy

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentForward:
    """Runs a segment on merged rows alone."""

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

        batch = MicroBatch(run, [first for first, *_ in passage.owners], 1, merged_only=True)
        self.lockstep.run(batch, grad=torch.is_grad_enabled())
        return outputs


def sample_inputs(
    runner: SegmentForward,
    modules: Mapping[str, nn.Module],
    passages: Sequence[SegmentBatch],
    policy: Policy,
) -> dict[str, Tensor] | None:
    """Some of the inputs of every site of the segment, (tokens, in); None where it does not give
    by itself what it gave within the model."""
    tokens: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    each = -(-policy.polish_tokens // len(passages))

    def noting(site: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            shown = site_of(site, module).tokens(args[0].detach())
            # At random: every n-th token of a row may be of one column of the picture.
            some = torch.randperm(len(shown), generator=generator)[:each]
            tokens.setdefault(site, []).append(shown[some.to(shown.device)].float())

        return note

    handles = [modules[s].register_forward_pre_hook(noting(s)) for s in runner.segment.sites]
    try:
        with torch.no_grad():
            for passage in passages:
                found = runner(passage)
                if not found or not alike(found, passage.found, policy.segment_error):
                    return None
    except Exception as error:  # a row's share of an argument may be unknown
        if is_out_of_memory(error):
            raise
        _log.debug("%s cannot be run by itself", runner.segment.sites[0], exc_info=True)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.cat(some) for site, some in tokens.items()}
