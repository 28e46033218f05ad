"""A few hundred Adam steps from a closed-form merge: gradients, but no data.

The merged model's final output on each row is trained toward the output of that row's own LoRA;
each concept's error is relative to the size of its LoRA's effect. Only the merged factors are
trained. The best factors on held-out rows are kept, which may be the closed form.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..activations.micro_batch import MicroBatch
from ..errors import MismatchError
from ..lora import LowRank
from ..passes.batches import chunks
from ..passes.job import Job, Run
from .training import STEP, Factors, NoGradients, Steps, train, trained

_POLISHING, _TARGETS = "polishing", "outputs of each LoRA alone"


def expect_polish(job: Job, steps: int, batch: int) -> None:
    """Register the expected time of a polish after the sites."""
    job.eta.later(_TARGETS, of_rows=2.0)
    job.eta.later(_POLISHING, STEP * steps * batch)


def polish(
    run: Run, merged: Mapping[str, LowRank], steps: int, rate: float, batch: int
) -> tuple[dict[str, LowRank], list[str]]:
    """Run ``steps`` Adam steps at ``rate`` (cosine to zero) on ``batch`` rows each. Returns the
    changes, and notes on them."""
    job, final = run.job, _FinalOutputs(run)
    targets, scales = final.targets(batch)
    order = torch.randperm(len(final.owners), generator=job.generator)
    held_out = min(job.policy.polish_held_out, len(final.owners) // 4)
    kept_back, rows = order[:held_out].tolist(), order[held_out:]
    factors = Factors.of(merged)
    with torch.enable_grad():
        factors.put(run.lockstep)

    def loss_of(some: Sequence[int]) -> Tensor:
        output = final.outputs(some, merged=True)
        error = (output.float() - targets[list(some)].to(output.device)).flatten(1)
        return ((error**2).mean(dim=1) * scales[list(some)].to(output.device)).mean()

    def loss() -> Tensor:
        pick = torch.randint(len(rows), (min(batch, len(rows)),), generator=job.generator)
        return loss_of(rows[pick].tolist())

    def error() -> float:
        parts = [kept_back[i : i + batch] for i in range(0, len(kept_back), batch)]
        return sum(float(loss_of(part)) * len(part) for part in parts)

    def falls(step: int) -> float:
        return (1 + math.cos(math.pi * step / steps)) / 2

    groups = [{"params": factors.all, "lr": rate}]
    how = Steps(steps, falls, job.policy.polish_checked_every)
    try:
        with torch.no_grad():
            before = error()
        train(groups, how, loss, error, before, lambda done: job.tick(_POLISHING, done, steps))
    except NoGradients as why:
        return dict(merged), [
            f"polish_steps do nothing: {why}. If LoRAs change only cross-attention keys and "
            "values, the merge never runs the model to its output"
        ]
    with torch.no_grad():
        factors.put(run.lockstep)
    return trained(run.lockstep, merged), []


class _FinalOutputs:
    """The rows of the stages that produce the final output, and each row's concept."""

    def __init__(self, run: Run) -> None:
        self.job, self.lockstep, self.samples = run.job, run.lockstep, run.samples
        stages = list(run.stages())
        if not stages:
            raise MismatchError("Nothing to polish: no stage of the model is reached.")
        last = [stage for stage in stages if not stage.feeds_next] or stages[-1:]
        found: dict[int, tuple[int, Hashable]] = {}
        for stage in last:
            rows = stage.rows or range(len(stage.concept_ids))
            kinds = stage.batch_keys or [None] * len(rows)
            for row, owner, kind in zip(rows, stage.concept_ids, kinds, strict=True):
                found[row] = owner, (stage.name, kind)
        self.owners = [found[row][0] for row in sorted(found)]
        self.kinds = [found[row][1] for row in sorted(found)]

    def outputs(self, rows: Sequence[int], *, merged: bool) -> Tensor:
        """The final output on ``rows``, through the merged change or each row's own LoRA."""
        found: dict[int, Tensor] = {}

        def forward(some: Sequence[int]) -> None:
            found.update(zip(some, self.job.host.forward(self.samples, some), strict=True))

        for some in chunks(rows, self.kinds, len(rows)):
            owners = [self.owners[row] for row in some]
            batch = MicroBatch(lambda some=some: forward(some), owners, 1, merged_only=merged)
            self.lockstep.run(batch, grad=torch.is_grad_enabled())
        return torch.stack([found[row] for row in rows])

    def targets(self, batch: int) -> tuple[Tensor, Tensor]:
        """Each row's output under its own LoRA, and 1 / mean square change of its concept's
        outputs."""
        outputs: list[Tensor] = []
        changes: list[Tensor] = []
        self.lockstep.merged = {}
        for start in range(0, len(self.owners), batch):
            rows = range(start, min(start + batch, len(self.owners)))
            with torch.no_grad():
                own, base = (self.outputs(rows, merged=some).float() for some in (False, True))
            outputs.append(own.cpu())
            changes.append(((own - base) ** 2).flatten(1).mean(dim=1).cpu())
            self.job.tick(_TARGETS, rows.stop, len(self.owners))
        change, owner = torch.cat(changes), torch.as_tensor(self.owners)
        scales = torch.zeros_like(change)
        floor = float(change.mean()) * 1e-3 + 1e-12
        for concept, weight in enumerate(self.job.weights):
            mine = owner == concept
            if bool(mine.any()):
                scales[mine] = weight / max(float(change[mine].mean()), floor)
        return torch.cat(outputs), scales
