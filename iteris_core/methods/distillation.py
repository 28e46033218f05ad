"""Adam steps through the whole denoiser, from the closed form on.

The closed form fits every layer by itself, and no layer sees how others combine its error. Here all
merged factors of a denoiser are trained together on what it does to the merge's own rows r, to the
outputs f at its end and to the outputs h_b of each of its blocks:

    Σ_r w_r (‖f_merged(r) − f_LoRA(r)‖² + hints · mean_b ‖h_b,merged(r) − h_b,LoRA(r)‖² / s_b).

f_LoRA is what row r's own LoRA does, under the row's condition of use; the base's for generic rows.
w_r is the concept's weight over the mean ‖f_LoRA − f_base‖² of its rows, and s_b the block's error
before. The blocks' outputs (hints: Romero et al. 2015) tell each layer more of a row than its end
does: without them a merge fits its rows as closely, and keeps less on other words. Blocks are
checkpointed, so a step holds each block's input and output, and the activations of one.

Text encoders stay as the closed form left them: on the toybox five LoRAs keep .98 with the merged
text encoder and their own denoiser, and .43 the other way round.
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
from ..activations.memory import halved, tensors_in, with_less
from ..activations.micro_batch import MicroBatch
from ..hosts.protocol import Stage
from ..linalg import truncate_factors
from ..lora import LowRank
from ..passes.batches import ExecutionConfig, chunks, micro_batches
from ..passes.job import Job, Run
from ..passes.planner import find, replayable

WHAT = "steps through the denoiser"
_AT_ONCE, _WARM = 4, 10
"""Rows at once while effects are measured, and steps until the learning rate is full."""


def expect_distillation(job: Job, steps: int) -> None:
    """Expect its work: in every step the LoRAs' forward, the merge's, its blocks' again and the
    gradients."""
    job.eta.expect(WHAT, [job.forward_work * 5.0 * steps * job.thresholds.batch])


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
        over = max(1.0, after.squared_norm() ** 0.5 / max(bounds[site], 1e-30))
        found[site] = after.scaled(1 / over).to(change.up.dtype)
    return found


class _Distillation:
    """The steps of one ``stage``."""

    def __init__(self, run: Run, stage: Stage, steps: int) -> None:
        self._job, self._lockstep, self._stage, self._steps = run.job, run.lockstep, stage, steps
        self._start = {site: run.lockstep.merged[site] for site in stage.sites}
        self._weights = list[float]()
        self._before = list[float]()
        """Each block's error at the start"""

    def trained(self) -> dict[str, LowRank]:
        """The changes of the stage's sites after all steps."""
        what = f"Out of memory in {WHAT}"
        with self._gradients() as blocks:
            self._weights = self._weights_of_rows()
            train = partial(self._train, blocks)
            ways = halved(self._job.thresholds.batch)
            return with_less(ways, train, lambda said, tried: f"{what} ({said}).")[0]

    def _weights_of_rows(self) -> list[float]:
        """w_r of every row."""
        thresholds, concepts = self._job.thresholds, self._job.concepts
        owners = self._stage.concept_ids
        few: dict[int, list[int]] = {}
        for row in torch.randperm(len(owners), generator=self._generator()).tolist():
            few.setdefault(owners[row], []).append(row)
        effects: dict[int, float] = {}
        for owner, rows in few.items():
            square, rows = 0.0, rows[: thresholds.batch]
            for some in chunks(rows, self._stage.batch_keys, _AT_ONCE):
                own, base = (self._outputs(some, 0, of_base) for of_base in (False, True))
                square += float((own - base).float().square().sum())
            effects[owner] = square / len(rows)
        known = [effect for effect in effects.values() if effect > 0]
        typical = sum(known) / max(len(known), 1)
        return [concepts[owner].weight / (effects[owner] or typical) for owner in owners]

    def _train(self, blocks: Sequence[nn.Module], at_once: int) -> dict[str, LowRank]:
        job, stage, steps, batch = self._job, self._stage, self._steps, self._job.thresholds.batch
        factors = {site: _leaves(change) for site, change in self._start.items()}
        kernels = {site: change.kernel for site, change in self._start.items()}
        every = [one for pair in factors.values() for one in pair]
        rate = job.thresholds.rate
        groups = [
            {"params": [one], "lr": rate * float(one.detach().square().mean().sqrt())}
            for one in every
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        falling = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1.0, (step + 1) / _WARM) * (1 - step / steps)
        )
        order, generator = list[int](), self._generator()
        self._before = [0.0] * len(blocks)
        try:
            for step in range(steps):
                job.tick(WHAT, step, steps)
                while len(order) < batch:
                    more = len(stage.concept_ids)
                    order += torch.randperm(more, generator=generator).tolist()
                rows, order = order[:batch], order[batch:]
                for some in chunks(rows, stage.batch_keys, at_once):
                    changes = {s: LowRank(*pair, kernels[s]) for s, pair in factors.items()}
                    self._lockstep.merged |= changes
                    self._add_gradients(every, blocks, sorted(some), first=step < _WARM)
                adam.step()
                falling.step()
                adam.zero_grad()
        finally:
            self._lockstep.merged |= self._start
        job.tick(WHAT, steps, steps)
        return {
            site: LowRank(up.detach(), down.detach(), kernels[site])
            for site, (up, down) in factors.items()
        }

    def _add_gradients(
        self,
        factors: Sequence[Tensor],
        blocks: Sequence[nn.Module],
        rows: Sequence[int],
        *,
        first: bool,
    ) -> None:
        """Add the gradients of these rows' loss to those of the ``factors``. At ``first``, the
        largest error of a block is kept as s_b."""
        wanted = list[Tensor]()
        wanted.append(self._outputs(rows, 0, False, hints=(blocks, wanted)))
        weights = [self._weights[row] for row in rows]

        def error(found: Tensor, target: Tensor) -> Tensor:
            by_row = (found.float() - target.float()).square().reshape(len(rows), -1).sum(1)
            return (by_row * by_row.new_tensor(weights)).sum()

        found = list[Tensor]()

        def loss(outputs: Tensor) -> None:
            *errors, end = map(error, [*found, outputs], wanted)
            total = end
            for number, block in enumerate(errors):
                if first:
                    before = float(block.detach()) / len(rows)
                    self._before[number] = max(self._before[number], before)
                share = self._job.thresholds.hints / len(errors)
                total = total + block * (share / max(self._before[number], 1e-30))
            total.backward(inputs=list(factors))  # weights of the base may want gradients, too

        # Within the forward: the backward pass runs blocks, and their changes, again.
        self._outputs(rows, 1, True, hints=(blocks, found), then=loss)

    def _outputs(
        self,
        rows: Sequence[int],
        copy: int,
        merged_only: bool,
        *,
        hints: tuple[Sequence[nn.Module], list[Tensor]] = ((), []),
        then: Callable[[Tensor], None] | None = None,
    ) -> Tensor:
        """The final outputs of ``rows`` with the texts of a ``copy``: of their own LoRAs or, with
        ``merged_only``, of what is merged by then (for copy 0 the base). The outputs of the blocks
        in ``hints`` go into its list. ``then`` gets the outputs with gradients."""
        stage, lockstep, made = self._stage, self._lockstep, list[Tensor]()
        assert stage.final is not None
        final = partial(stage.final, rows, copy)

        def run() -> None:
            made.append(final())
            if then is not None:
                then(made[0])

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            by_row = [leaf for leaf in tensors_in(output) if len(leaf) == len(rows)]
            hints[1].append(torch.cat([leaf.flatten(1) for leaf in by_row], 1))

        merged = lockstep.merged
        owners, conditions = [stage.concept_ids[row] for row in rows], stage.conditions_of(rows)
        batch = MicroBatch(run, owners, 1, merged_only=merged_only, conditions=conditions)
        with ExitStack() as stack:
            for block in hints[0]:
                stack.enter_context(block.register_forward_hook(keep))
            if merged_only and then is None:
                stack.callback(setattr, lockstep, "merged", merged)
                lockstep.merged = {}
            lockstep.run(batch, grad=then is not None)
        return made[0].detach()

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._job.calibration.seed)

    @contextmanager
    def _gradients(self) -> Generator[Sequence[nn.Module]]:
        """Context in which gradients pass through the stage, whose blocks, which it yields, are
        checkpointed."""
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
            yield list(blocks)


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
