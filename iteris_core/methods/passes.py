"""Runs over the model that several methods share: references only, or a sweep with solving."""

from __future__ import annotations

from collections.abc import Callable

from ..lockstep import Visitor
from ..lora import LowRank
from .batching import Batching, micro_batches
from .planning import plan
from .registry import Task


def reference_pass(task: Task, visitor: Visitor, batching: Batching) -> None:
    """Show ``visitor`` every site's reference rows: X with each LoRA alone active."""
    assert task.host is not None
    wanted = set(task.references)
    with task.lockstep() as lockstep:
        samples = task.samples(lockstep)
        before: set[str] = set()
        for stage in task.host.stages(samples, wanted):
            task.rows = max(task.rows, len(stage.owners))
            stage, fitted = plan(
                task, stage, lockstep, batching, copies=1, sweep=False, before=before
            )
            before |= set(stage.sites)
            batches = list(micro_batches(stage, 1, visitor, fitted, task.shards))
            for done, batch in enumerate(batches, 1):
                lockstep.run(batch)
                task.tick(f"features of the {stage.name}", done, len(batches))


def sweep_pass(
    task: Task,
    make_visitor: Callable[[], tuple[Visitor, Callable[[str], LowRank]]],
    batching: Batching,
) -> None:
    """Solve every site in execution order; ``make_visitor`` gives each stage a visitor and a solve
    that is called once all rows have shown a site (DESIGN 3.5 and 3.6)."""
    assert task.host is not None
    wanted = set(task.references)
    total, solved = len(wanted), 0
    with task.lockstep() as lockstep:
        samples = task.samples(lockstep)
        task.tick("solving sites", 0, total)
        for stage in task.host.stages(samples, wanted):
            stage, fitted = plan(task, stage, lockstep, batching, copies=2, sweep=True)
            task.rows = max(task.rows, len(stage.owners))
            visitor, solve = make_visitor()

            def counted(site: str, solve: Callable[[str], LowRank] = solve) -> LowRank:
                nonlocal solved
                change = solve(site)
                solved += 1
                task.tick("solving sites", solved, total)
                return change

            batches = list(micro_batches(stage, 2, visitor, fitted, task.shards))
            lockstep.sweep(batches, counted, set() if stage.feeds else set(stage.sites))
