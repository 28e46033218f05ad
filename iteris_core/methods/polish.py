"""A few hundred Adam steps from a closed-form merge: gradients, but no data.

The merged model's final output on each row is drawn toward what that row's own LoRA gives there,
each concept's error counted relative to what its LoRA changes. Only the merged factors are
trained; the best ones seen on held-out rows are kept, the closed form among them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from ..activations.micro_batch import MicroBatch
from ..errors import MismatchError
from ..lora import LowRank
from ..passes.batches import chunks
from ..passes.job import Job, Run

_CHECK_EVERY = 25
_POLISHING, _TARGETS = "polishing", "outputs of each LoRA alone"
_NOTHING = (
    "polish_steps do nothing: for LoRAs that change cross-attention keys and values alone the "
    "merge runs no forward to the model's output"
)
_STEP = 3.0  # forwards: one, and twice as much for the gradients


def expect_polish(job: Job, steps: int, batch: int) -> None:
    """Foretell the time of a polish behind the sites."""
    job.eta.later(_TARGETS, of_rows=2.0)
    job.eta.later(_POLISHING, _STEP * steps * batch)


def polish(
    job: Job,
    run: Run,
    merged: Mapping[str, LowRank],
    steps: int,
    rate: float,
    batch: int,
    held_out: int = 64,
) -> tuple[dict[str, LowRank], list[str]]:
    """``steps`` Adam steps at ``rate`` (cosine to zero) on ``batch`` rows each. The changes, and
    notes on them."""
    stage = _LastStages(job, run)
    targets, scales = stage.targets(batch)
    order = torch.randperm(len(stage.owners), generator=job.generator)
    held_out = min(held_out, len(stage.owners) // 4)
    kept_back, rows = order[:held_out].tolist(), order[held_out:]
    factors = [
        factor.float().clone().requires_grad_()
        for change in merged.values()
        for factor in (change.up, change.down)
    ]
    run.lockstep.merged = _changes(merged, factors)
    optimizer = torch.optim.Adam(factors, lr=rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(some: Sequence[int], *, grad: bool) -> Tensor:
        output = stage.outputs(some, merged=True, grad=grad)
        error = (output.float() - targets[list(some)].to(output.device)).flatten(1)
        return ((error**2).mean(dim=1) * scales[list(some)].to(output.device)).mean()

    def check() -> float:
        parts = [kept_back[i : i + batch] for i in range(0, len(kept_back), batch)]
        return sum(float(loss(part, grad=False)) * len(part) for part in parts)

    best, best_loss = [factor.detach().clone() for factor in factors], check()
    for step in range(steps):
        pick = torch.randint(len(rows), (min(batch, len(rows)),), generator=job.generator)
        with torch.enable_grad():
            value = loss(rows[pick].tolist(), grad=True)
            # Of some sites nothing reaches the output, such as a text encoder's last layers.
            gradients = (
                torch.autograd.grad(value, factors, allow_unused=True)
                if value.requires_grad
                else [None] * len(factors)
            )
        if all(gradient is None for gradient in gradients):
            return dict(merged), [_NOTHING]
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient
        optimizer.step()
        schedule.step()
        if (step + 1) % _CHECK_EVERY == 0 or step + 1 == steps:
            now = check()
            if now < best_loss:
                best_loss, best = now, [factor.detach().clone() for factor in factors]
        job.tick(_POLISHING, step + 1, steps)
    dtypes = {site: change.up.dtype for site, change in merged.items()}
    changes = _changes(merged, best)
    return {site: change.to(dtypes[site]) for site, change in changes.items()}, []


def _changes(like: Mapping[str, LowRank], factors: Sequence[Tensor]) -> dict[str, LowRank]:
    """The changes whose up and down factors come in turn."""
    pairs = zip(like.items(), factors[::2], factors[1::2], strict=True)
    return {site: LowRank(up, down, change.kernel) for (site, change), up, down in pairs}


class _LastStages:
    """The rows of the stages that give the final output, and each one's concept."""

    def __init__(self, job: Job, run: Run) -> None:
        self.job, self.lockstep, self.samples = job, run.lockstep, run.samples
        stages = list(run.stages())
        if not stages:
            raise MismatchError("There is nothing to polish: no stage of the model is reached.")
        last = [stage for stage in stages if not stage.feeds_next] or stages[-1:]
        found: dict[int, tuple[int, Hashable]] = {}
        for stage in last:
            rows = stage.rows or range(len(stage.concept_ids))
            kinds = stage.batch_keys or [None] * len(rows)
            for row, owner, kind in zip(rows, stage.concept_ids, kinds, strict=True):
                found[row] = owner, (stage.name, kind)
        self.owners = [found[row][0] for row in sorted(found)]
        self.kinds = [found[row][1] for row in sorted(found)]

    def outputs(self, rows: Sequence[int], *, merged: bool, grad: bool = False) -> Tensor:
        """The final output on ``rows``, through the merged change or each row's own LoRA."""
        found: dict[int, Tensor] = {}
        for some in chunks(rows, self.kinds, len(rows)):
            outputs = self._outputs(some, merged=merged, grad=grad)
            found |= dict(zip(some, outputs, strict=True))
        return torch.stack([found[row] for row in rows])

    def _outputs(self, rows: Sequence[int], *, merged: bool, grad: bool) -> Tensor:
        outputs: list[Tensor] = []
        owners = [self.owners[row] for row in rows]

        def forward() -> None:
            outputs.append(self.job.host.forward(self.samples, rows))

        self.lockstep.run(MicroBatch(forward, owners, 1, merged_only=merged), grad=grad)
        return outputs[0]

    def targets(self, batch: int) -> tuple[Tensor, Tensor]:
        """Each row's output under its own LoRA, and 1 / mean square change of its concept's
        outputs."""
        outputs: list[Tensor] = []
        changes: list[Tensor] = []
        self.lockstep.merged = {}
        for start in range(0, len(self.owners), batch):
            rows = range(start, min(start + batch, len(self.owners)))
            own = self.outputs(rows, merged=False).float()
            base = self.outputs(rows, merged=True).float()
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
