"""Runs over the model that several methods share: references only, or a sweep with solving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..hosts import Stage
from ..lockstep import MicroBatch, Visitor
from ..lora import LowRank
from ..visit import TokenChoice
from .registry import Task


@dataclass(frozen=True)
class Batching:
    """``rows`` a forward; at most ``row_tokens`` tokens of each row in the moments (None: all)."""

    rows: int
    row_tokens: int | None = None
    seed: int = 0


def micro_batches(
    stage: Stage, copies: int, visitor: Visitor | None, batching: Batching
) -> Iterator[MicroBatch]:
    """The rows of a stage in order, ``batching.rows`` at a time."""
    size, limit = batching.rows, batching.row_tokens
    for start in range(0, len(stage.owners), size):
        rows = range(start, min(start + size, len(stage.owners)))

        def run(rows: Sequence[int] = rows) -> None:
            stage.run(rows, copies)

        def mask_of(site: str, rows: Sequence[int] = rows) -> Tensor | None:
            return stage.mask(site, rows) if stage.mask is not None else None

        owners = [stage.owners[row] for row in rows]
        choice = None if limit is None else TokenChoice(rows, limit, batching.seed)
        yield MicroBatch(
            run, owners, copies, visitor, mask_of=mask_of, stage=stage.name, choice=choice
        )


def reference_pass(task: Task, visitor: Visitor, batching: Batching) -> None:
    """Show ``visitor`` every site's reference rows: X with each LoRA alone active."""
    assert task.host is not None
    wanted = set(task.references)
    with task.lockstep() as lockstep:
        samples = task.samples(lockstep)
        for stage in task.host.stages(samples, wanted):
            task.rows = max(task.rows, len(stage.owners))
            batches = list(micro_batches(stage, 1, visitor, batching))
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
            task.rows = max(task.rows, len(stage.owners))
            visitor, solve = make_visitor()

            def counted(site: str, solve: Callable[[str], LowRank] = solve) -> LowRank:
                nonlocal solved
                change = solve(site)
                solved += 1
                task.tick("solving sites", solved, total)
                return change

            lockstep.sweep(list(micro_batches(stage, 2, visitor, batching)), counted)
