"""A few hundred Adam steps from a closed-form merge: gradients, but no data.

The merged model's final output on each row is drawn toward what that row's own LoRA gives there,
each concept's error counted relative to what its LoRA changes. Only the merged factors are
trained; the best ones seen on held-out rows are kept, the closed form among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep, MicroBatch
from ..errors import IterisError
from ..lora import LowRank
from ..passes.job import Job

_CHECK_EVERY = 25


def polish(
    job: Job,
    merged: Mapping[str, LowRank],
    *,
    steps: int,
    rate: float,
    batch: int,
    held_out: int = 64,
) -> dict[str, LowRank]:
    """``steps`` Adam steps at ``rate`` (cosine to zero) on ``batch`` rows each."""
    with job.lockstep() as lockstep:
        samples = job.samples(lockstep)
        owners = _owners(job, samples)
        targets, scales = _targets(job, lockstep, samples, owners, batch)
        order = torch.randperm(len(owners), generator=job.generator)
        held_out = min(held_out, len(owners) // 4)
        kept_back, rows = order[:held_out].tolist(), order[held_out:]
        trained = {
            site: LowRank(
                change.up.float().clone().requires_grad_(),
                change.down.float().clone().requires_grad_(),
                change.kernel,
            )
            for site, change in merged.items()
        }
        lockstep.merged = trained
        factors = [factor for c in trained.values() for factor in (c.up, c.down)]
        optimizer = torch.optim.Adam(factors, lr=rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        def loss(some: Sequence[int], *, grad: bool) -> Tensor:
            output = _forward(job, lockstep, samples, some, owners, merged=True, grad=grad)
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
                gradients = torch.autograd.grad(value, factors)
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.grad = gradient
            optimizer.step()
            schedule.step()
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == steps:
                now = check()
                if now < best_loss:
                    best_loss, best = now, [factor.detach().clone() for factor in factors]
            job.tick("polishing", step + 1, steps)
    pairs = zip(best[::2], best[1::2], strict=True)
    return {
        site: LowRank(up, down, merged[site].kernel).to(merged[site].up.dtype)
        for site, (up, down) in zip(merged, pairs, strict=True)
    }


def _owners(job: Job, samples: Any) -> Sequence[int]:
    """The concept of every row of the last stage, which gives the final output."""
    stages = list(job.host.stages(samples, set(job.changes)))
    if not stages:
        raise IterisError("There is nothing to polish: no stage of the model is reached.")
    return stages[-1].owners


def _targets(
    job: Job, lockstep: Lockstep, samples: Any, owners: Sequence[int], batch: int
) -> tuple[Tensor, Tensor]:
    """Each row's output under its own LoRA, and 1 / mean square change of its concept's outputs."""
    outputs: list[Tensor] = []
    changes: list[Tensor] = []
    lockstep.merged = {}
    for start in range(0, len(owners), batch):
        rows = range(start, min(start + batch, len(owners)))
        own = _forward(job, lockstep, samples, rows, owners, merged=False, grad=False).float()
        base = _forward(job, lockstep, samples, rows, owners, merged=True, grad=False).float()
        outputs.append(own.cpu())
        changes.append(((own - base) ** 2).flatten(1).mean(dim=1).cpu())
        job.tick("outputs of each LoRA alone", rows.stop, len(owners))
    change, owner = torch.cat(changes), torch.as_tensor(owners)
    scales = torch.zeros_like(change)
    floor = float(change.mean()) * 1e-3 + 1e-12
    for concept, weight in enumerate(job.weights):
        mine = owner == concept
        if bool(mine.any()):
            scales[mine] = weight / max(float(change[mine].mean()), floor)
    return torch.cat(outputs), scales


def _forward(
    job: Job,
    lockstep: Lockstep,
    samples: Any,
    rows: Sequence[int],
    owners: Sequence[int],
    *,
    merged: bool,
    grad: bool,
) -> Tensor:
    outputs: list[Tensor] = []
    host = job.host
    lockstep.run(
        MicroBatch(
            lambda: outputs.append(host.forward(samples, rows)),
            [owners[row] for row in rows],
            1,
            merged_only=merged,
        ),
        grad=grad,
    )
    return outputs[0]
