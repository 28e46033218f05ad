"""Runs over the model that several methods share: references only, or a sweep with solving."""

from __future__ import annotations

from collections.abc import Callable

from ..activations.lockstep import Visitor
from ..lora import LowRank
from .batches import Batching, micro_batches
from .budget import plan
from .job import Job


def reference_pass(job: Job, visitor: Visitor, batching: Batching) -> None:
    """Show ``visitor`` every site's reference rows: X with each LoRA alone active."""
    assert job.host is not None
    wanted = set(job.references)
    with job.lockstep() as lockstep:
        samples = job.samples(lockstep)
        before: set[str] = set()
        for stage in job.host.stages(samples, wanted):
            job.rows = max(job.rows, len(stage.owners))
            stage, fitted = plan(
                job, stage, lockstep, batching, copies=1, sweep=False, before=before
            )
            before |= set(stage.sites)
            batches = list(micro_batches(stage, 1, visitor, fitted, job.shards))
            for done, batch in enumerate(batches, 1):
                lockstep.run(batch)
                job.tick(f"features of the {stage.name}", done, len(batches))


def sweep_pass(
    job: Job,
    make_visitor: Callable[[], tuple[Visitor, Callable[[str], LowRank]]],
    batching: Batching,
) -> None:
    """Solve every site in execution order; ``make_visitor`` gives each stage a visitor and a solve
    that is called once all rows have shown a site (DESIGN 3.5 and 3.6)."""
    assert job.host is not None
    wanted = set(job.references)
    total, solved = len(wanted), 0
    with job.lockstep() as lockstep:
        samples = job.samples(lockstep)
        job.tick("solving sites", 0, total)
        for stage in job.host.stages(samples, wanted):
            stage, fitted = plan(job, stage, lockstep, batching, copies=2, sweep=True)
            job.rows = max(job.rows, len(stage.owners))
            visitor, solve = make_visitor()

            def counted(site: str, solve: Callable[[str], LowRank] = solve) -> LowRank:
                nonlocal solved
                change = solve(site)
                solved += 1
                job.tick("solving sites", solved, total)
                return change

            batches = list(micro_batches(stage, 2, visitor, fitted, job.shards))
            lockstep.sweep(batches, counted, set() if stage.feeds else set(stage.sites))
