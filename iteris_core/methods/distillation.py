"""Adam steps through the whole denoiser, from the closed form on.

The closed form fits every layer by itself, and no layer sees how the others combine its error. Here
all merged factors of a denoiser are trained together on its final outputs f,

    Σ w_r ‖f_merged(r) − f_LoRA(r)‖²,   w_r = concept's weight / (‖f_LoRA(r) − f_base(r)‖² + ε),

for the rows r that the merge has collected its features from: those of every LoRA, under their own
conditions of use, and generic ones, on which f_LoRA is the base's. ε is a share of the concept's
mean, so that no row on which its LoRA does little counts beyond measure. Blocks are checkpointed:
a step holds one row's stream at every block, and the activations of one block.

Text encoders stay as the closed form left them. On the toybox, five LoRAs keep .98 of each with the
merged text encoder and their own denoiser, and .43 the other way round.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..activations.barriers import unwritten
from ..activations.memory import halved, with_less
from ..activations.micro_batch import MicroBatch
from ..hosts.protocol import Stage
from ..linalg import truncate_factors
from ..lora import LowRank
from ..passes.batches import ExecutionConfig, chunks, micro_batches
from ..passes.job import Job, Run
from ..passes.planner import find, replayable

WHAT = "steps through the denoiser"


def expect_distillation(job: Job, steps: int) -> None:
    """Expect its work: targets and the base once for every row, and for every step a forward, the
    blocks again, and gradients."""
    rows = job.samples_of(job.calibration) * job.calibration.rows_each
    forwards = 2 * rows + 4.0 * steps * job.thresholds.batch
    job.eta.expect(WHAT, [job.forward_work * forwards])


def distil(
    run: Run, merged: Mapping[str, LowRank], steps: int, bounds: Mapping[str, float]
) -> dict[str, LowRank]:
    """The ``merged`` changes after that many ``steps``, with norms at most ``bounds``."""
    job, lockstep = run.job, run.lockstep
    lockstep.merged = dict(merged)
    for stage in run.stages():
        if stage.feeds_next:
            for batch in micro_batches(stage, 2, None, ExecutionConfig(job.thresholds.batch)):
                lockstep.run(batch)
        elif stage.final is not None and stage.sites:
            lockstep.merged |= _Distillation(run, stage, steps).trained()
    job.eta.expect(WHAT, [])
    found: dict[str, LowRank] = {}
    for site, change in merged.items():
        after = lockstep.merged[site]
        norm = after.squared_norm() ** 0.5
        over = max(1.0, norm / bounds[site]) if norm else 1.0
        found[site] = after.scaled(1 / over).to(change.up.dtype)
    return found


class _Distillation:
    """The steps of one ``stage``."""

    def __init__(self, run: Run, stage: Stage, steps: int) -> None:
        self._job, self._lockstep, self._stage, self._steps = run.job, run.lockstep, stage, steps
        self._kernels = {site: run.lockstep.merged[site].kernel for site in stage.sites}
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}

    def trained(self) -> dict[str, LowRank]:
        """The changes of the stage's sites after all steps."""
        batch, what = self._job.thresholds.batch, f"Out of memory in {WHAT}"
        rows = range(len(self._stage.concept_ids))

        def train(at_once: int) -> dict[str, LowRank]:
            wanted, weights = self._targets(rows, at_once)
            return self._train(wanted, weights, at_once)

        with self._gradients():
            return with_less(halved(batch), train, lambda said, tried: f"{what} ({said}).")[0]

    def _targets(
        self, rows: Sequence[int], at_once: int
    ) -> tuple[dict[int, Tensor], dict[int, float]]:
        """Row → its output under its own LoRA, float32, on the CPU; and its weight in the loss."""
        merged, self._lockstep.merged = self._lockstep.merged, {}
        wanted: dict[int, Tensor] = {}
        effects: dict[int, float] = {}
        owners, concepts = self._stage.concept_ids, self._job.concepts
        try:
            for some in chunks(rows, self._stage.batch_keys, at_once):
                self._job.tick(WHAT, 0, self._steps)
                own, base = (
                    self._outputs(some, 0, merged_only=of_base) for of_base in (False, True)
                )
                for row, target, plain in zip(
                    some, own.float().cpu(), base.float().cpu(), strict=True
                ):
                    wanted[row] = target
                    effects[row] = float((target - plain).square().sum())
        finally:
            self._lockstep.merged = merged
        of_concept: dict[int, list[float]] = {}
        for row, owner in enumerate(owners):
            of_concept.setdefault(owner, []).append(effects[row])
        means = {owner: sum(some) / len(some) for owner, some in of_concept.items()}
        active = [mean for mean in means.values() if mean > 0]
        typical = sum(active) / max(len(active), 1)
        share = self._job.thresholds.even
        return wanted, {
            row: concepts[owner].weight
            / ((1 - share) * effects[row] + share * means[owner] if means[owner] else typical)
            for row, owner in enumerate(owners)
        }

    def _train(
        self, wanted: Mapping[int, Tensor], weights: Mapping[int, float], at_once: int
    ) -> dict[str, LowRank]:
        job, stage, steps, batch = self._job, self._stage, self._steps, self._job.thresholds.batch
        start = {site: self._lockstep.merged[site] for site in stage.sites}
        self._factors = {site: _leaves(change) for site, change in start.items()}
        groups = [
            {
                "params": [one],
                "lr": job.thresholds.rate * float(one.detach().square().mean().sqrt()),
            }
            for pair in self._factors.values()
            for one in pair
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / steps)
        generator = torch.Generator().manual_seed(job.calibration.seed)
        order: list[int] = []
        try:
            for step in range(steps):
                while len(order) < batch:
                    order += torch.randperm(len(wanted), generator=generator).tolist()
                rows, order = order[:batch], order[batch:]
                for some in chunks(rows, stage.batch_keys, at_once):
                    self._backward(some, wanted, weights)
                adam.step()
                falling.step()
                adam.zero_grad()
                job.tick(WHAT, step + 1, steps)
        finally:
            self._lockstep.merged |= start
        return {
            site: LowRank(up.detach(), down.detach(), self._kernels[site])
            for site, (up, down) in self._factors.items()
        }

    def _backward(
        self, rows: Sequence[int], wanted: Mapping[int, Tensor], weights: Mapping[int, float]
    ) -> None:
        """Add the gradients of these rows' loss to the factors."""

        def loss(outputs: Tensor) -> None:
            target = torch.stack([wanted[row] for row in rows]).to(outputs.device)
            by_row = (outputs.float() - target).square().flatten(1).sum(1)
            (by_row * by_row.new_tensor([weights[row] for row in rows])).sum().backward()

        self._lockstep.merged |= {
            site: LowRank(*pair, self._kernels[site]) for site, pair in self._factors.items()
        }
        # Within the forward: the backward pass runs blocks, and their changes, again.
        self._outputs(rows, 1, merged_only=True, then=loss)

    def _outputs(
        self,
        rows: Sequence[int],
        copy: int,
        *,
        merged_only: bool,
        then: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The final outputs of ``rows`` with the texts of a ``copy``; ``then`` gets them with
        gradients."""
        assert self._stage.final is not None
        final, found = partial(self._stage.final, rows, copy), list[Tensor]()

        def run() -> None:
            found.append(final())
            if then is not None:
                then(found[0])

        owners, conditions = (
            [self._stage.concept_ids[row] for row in rows],
            self._stage.conditions_of(rows),
        )
        batch = MicroBatch(run, owners, 1, merged_only=merged_only, conditions=conditions)
        self._lockstep.run(batch, grad=then is not None)
        return found[0].detach()

    @contextmanager
    def _gradients(self) -> Generator[None]:
        """Context in which gradients pass through the stage, whose blocks are checkpointed. Raises
        :class:`NotTrained` if the stage then gives another result."""
        stage, lockstep, thresholds = self._stage, self._lockstep, self._job.thresholds
        trace = find(stage, lockstep)
        blocks = replayable(stage, lockstep, trace.barriers(thresholds.blocks[-1])).blocks
        inside = {part for block in blocks for part in block.modules()}
        network = trace.inside[trace.sites[0]][0]
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(stage.gradients())
            stack.enter_context(differentiable([m for m in network.modules() if m not in inside]))
            for block, of in blocks.items():
                stack.enter_context(checkpointed(block, of.written, stage.gradients))
            yield


def checkpointed(
    block: nn.Module, written: Set[str], gradients: Callable[[], AbstractContextManager[None]]
) -> AbstractContextManager[Any]:
    """Context in which a differentiated forward of ``block`` keeps its arguments alone, and runs
    again, within ``gradients()``, for the backward pass. It gets copies of the arguments that it
    has ``written`` to."""
    forward = block.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        given = unwritten(written, args, kwargs)
        with gradients(), differentiable(block.modules()):
            return forward(*given[0], **given[1])

    def through(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        again = partial(run, *args, **kwargs)
        return checkpoint(again, use_reentrant=False, preserve_rng_state=False)

    return patch.object(block, "forward", through)


@contextmanager
def differentiable(modules: Iterable[nn.Module]) -> Generator[None]:
    """Context in which weights of ``modules`` that were loaded in inference mode, through which no
    gradient passes, are replaced by copies."""
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for module in modules:
            stores: list[dict[str, Any]] = [module._parameters, module._buffers]
            for named in stores:
                for name, value in named.items():
                    if value is not None and value.is_inference():
                        replaced.append((named, name, value))
                        copy = value.detach().clone()
                        if isinstance(value, nn.Parameter):
                            copy = nn.Parameter(copy, requires_grad=False)
                        named[name] = copy
        yield
    finally:
        for named, name, value in replaced:
            named[name] = value


def _leaves(change: LowRank) -> tuple[Tensor, Tensor]:
    """Its factors, of equal size in every component, as float32 leaves."""
    even, _ = truncate_factors(change.to(torch.float32), change.rank)
    return even.up.requires_grad_(), even.down.requires_grad_()
