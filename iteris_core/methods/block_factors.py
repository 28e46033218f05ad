"""What the polish of a block trains, and how the block is run on it.

Up factors are trained as they are, down factors where inputs are white
(:mod:`..linalg.whitening`): a step of one size then moves what the block gives about as much in
every direction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..activations.lockstep import Lockstep
from ..activations.meter import is_out_of_memory
from ..activations.micro_batch import MicroBatch
from ..activations.segments import ByRow, Segment, SegmentBatch
from ..activations.site import site_of
from ..errors import IterisError, brief
from ..linalg.whitening import Whitening
from ..lora import LowRank

_log = logging.getLogger(__name__)
FLOOR = 1e-3
TOKENS = 4096
"""So many tell the moments of a site's inputs."""
_SAME = 1e-2


class NoGradients(IterisError):
    """The segment has an operation that cannot be differentiated."""


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


@dataclass(frozen=True)
class Factors:
    """Up factors, and down factors where inputs are white, by site; float32 leaves."""

    ups: Mapping[str, Tensor]
    downs: Mapping[str, Tensor]
    whitenings: Mapping[str, Whitening]
    kernels: Mapping[str, Any]

    @classmethod
    def of(cls, merged: Mapping[str, LowRank], tokens: Mapping[str, Tensor]) -> Factors:
        """Of the ``merged`` changes of those sites whose inputs are given, (tokens, in)."""
        ups: dict[str, Tensor] = {}
        downs: dict[str, Tensor] = {}
        whitenings = {site: Whitening.of(some, FLOOR) for site, some in tokens.items()}
        for site, whitening in whitenings.items():
            change = merged[site].to(torch.float32, whitening.roots.device)
            up, across = torch.linalg.qr(change.up)
            left, values, right = torch.linalg.svd(
                across @ whitening.root(change.down), full_matrices=False
            )
            root = values.sqrt()
            ups[site] = (up @ left * root).detach().requires_grad_()
            downs[site] = (root[:, None] * right).detach().requires_grad_()
        kernels = {site: merged[site].kernel for site in whitenings}
        return cls(ups, downs, whitenings, kernels)

    @property
    def all(self) -> list[Tensor]:
        return [*self.ups.values(), *self.downs.values()]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        return [
            {"params": [factor], "lr": rate * float(factor.detach().square().mean().sqrt())}
            for factor in self.all
        ]

    def put(self, lockstep: Lockstep, *, final: bool = False) -> None:
        """As merged changes; ``final``: without their gradients."""
        for site, whitening in self.whitenings.items():
            up, down = self.ups[site], whitening.inverse_root(self.downs[site])
            if final:
                up, down = up.detach(), down.detach()
            lockstep.merged[site] = LowRank(up, down, self.kernels[site])


def gradients_of(loss: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(loss, factors, allow_unused=True, materialize_grads=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise NoGradients(brief(error)) from error


def sample_inputs(
    runner: SegmentForward, modules: Mapping[str, nn.Module], passages: Sequence[SegmentBatch]
) -> dict[str, Tensor] | None:
    """Some of the inputs of every site of the segment, (tokens, in); None where it does not give
    by itself what it gave within the model."""
    tokens: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(0)
    each = -(-TOKENS // len(passages))

    def noting(site: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            shown = site_of(site, module).tokens(args[0].detach())
            # At random: tokens of a row come in turn, and every so manieth are not like the others.
            some = torch.randperm(len(shown), generator=generator)[:each]
            tokens.setdefault(site, []).append(shown[some.to(shown.device)].float())

        return note

    handles = [modules[s].register_forward_pre_hook(noting(s)) for s in runner.segment.sites]
    try:
        with torch.no_grad():
            if not all(_alike(runner(passage), passage.found) for passage in passages):
                return None
    except Exception as error:  # a row's share of an argument may not be told from another
        if is_out_of_memory(error):
            raise
        _log.debug("%s cannot be run by itself", runner.segment.sites[0], exc_info=True)
        return None
    finally:
        for handle in handles:
            handle.remove()
    return {site: torch.cat(some) for site, some in tokens.items()}


def _alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return bool(others) and all(
        one.shape == other.shape
        and float((one.float().cpu() - other.float()).norm()) <= _SAME * float(other.float().norm())
        for one, other in zip(some, others, strict=True)
    )
