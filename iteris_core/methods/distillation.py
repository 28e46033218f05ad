"""Adam steps through the whole denoiser, from the closed form on.

The closed form fits every layer by itself, and no layer sees how others combine its error. Here all
merged factors of a denoiser are trained together on what it does to the merge's own rows
(:mod:`.row_gradients`).

Text encoders stay as the closed form left them: on the toybox five LoRAs keep .98 with the merged
text encoder and their own denoiser, and .43 the other way round.

What ends the steps early loses neither those taken by then nor the merge: memory that runs out, a
model that cannot be differentiated, gradients that are not finite, or the user.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..activations.gradients import Network
from ..activations.memory import halved, with_less
from ..errors import SolveError, brief
from ..hosts.protocol import Stage
from ..linalg import truncate_factors
from ..lora import LowRank
from ..passes.batches import ExecutionConfig, chunks, micro_batches
from ..passes.job import Merged, Run
from ..passes.planner import allowed, left_by
from .fitting import bounds_of
from .row_gradients import RowGradients, network_of

WHAT = "steps through the denoiser"
_WARM = 10
"""Steps until the learning rate is full."""
_WORK = 5.0
"""A row's step in forwards: the LoRA's, the merge's, its blocks' again, and the gradients, which in
attention take two."""
_STATE = 16
"""Bytes of a number of a factor, its gradient and Adam's two moments of it."""
_ROOM = 8
"""A forward's memory, this many times, is kept free for the first measurement."""
_log = logging.getLogger(__name__)


def _is_trained(stage: Stage) -> bool:
    return stage.final is not None and bool(stage.sites) and not stage.feeds_next


@dataclass
class Distillation:
    """The ``steps`` of every denoiser of a ``run``. ``taken`` counts those of all, and ``stopped``
    is what the user stopped them by if the job rescues its merge then."""

    run: Run
    steps: int
    taken: int = 0
    stopped: BaseException | None = None
    _fits: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    """Stage → how many of its rows fit at once, and the bytes that they take."""
    _left_out: dict[str, str] = field(default_factory=dict[str, str])
    """Stage → a note, where not even one row fits."""
    _networks: dict[str, Network] = field(default_factory=dict[str, Network])

    def __post_init__(self) -> None:
        self._expect()

    def _expect(self) -> None:
        """Expect the work of all stages that are not left out."""
        job = self.run.job
        rows = self.steps * job.thresholds.batch
        work = {
            s.stage.name: s.products * _WORK * rows
            for s in job.trace.stages
            if _is_trained(s.stage)
        }
        job.eta.expect(WHAT, [of for name, of in work.items() if name not in self._left_out])

    def plan(self, stage: Stage, before: Sequence[Stage]) -> str:
        """Plan the steps of a ``stage``, after the stages ``before`` it, within the memory budget.
        Returns the plan in words; empty without a budget."""
        if self.run.job.memory_budget is None or not _is_trained(stage):
            return ""
        name, batch = f"steps through the {stage.name}", self.run.job.thresholds.batch
        try:
            (rows, size, budget), _ = with_less([(stage, before)], self._fitting, _complaint)
            gib, free = size / 2**30, budget / 2**30
            line = f"{name}: {rows} of {batch} rows at once, {gib:.2f} of {free:.2f} GiB"
            why = "" if rows else f", one row needs {gib:.3g} of {free:.3g} GiB"
            self._fits[stage.name] = rows, size
        except Exception as error:
            if self._cancels(error):
                raise
            line, why = "", f": {brief(error)}"
        if why:
            line = self._left_out[stage.name] = f"{name}: left out{why}"
            _log.warning("%s", line)
        self._expect()
        return line

    def _fitting(self, given: tuple[Stage, Sequence[Stage]]) -> tuple[int, int, int]:
        """How many rows fit at once by the measured cost of one and of two, the bytes that they, or
        one, take beyond the model, and the budget."""
        (stage, before), job, lockstep = given, self.run.job, self.run.lockstep
        batch, ranks = job.thresholds.batch, self._ranks(stage)
        fixed = sum(
            _STATE * rank * sum(lockstep.changes[site].shape) for site, rank in ranks.items()
        )
        fixed += left_by(job, (*before, stage), 2)
        forward = [of.forward for of in job.trace.stages if of.stage.name == stage.name]
        allowed(job, fixed + sum(_ROOM * (of.running + of.forward) for of in forward))
        network = self._network(stage)
        gradients = RowGradients(self.run, stage, network, self._largest(stage, network), copy=0)
        with gradients.active():
            one = gradients.peak(1)
        fixed += lockstep.cast_bytes
        budget, each = allowed(job, fixed + batch * one), one
        if fixed + 2 * one <= budget:  # two show what does not grow with the number of rows
            with gradients.active():
                each = min(max(gradients.peak(2) - one, 0), one)
        sizes = [fixed + one + more * each for more in range(batch)]
        rows = sum(size <= budget for size in sizes)
        return rows, sizes[max(rows, 1) - 1], budget

    def _network(self, stage: Stage) -> Network:
        """The stage's, found once: blocks that would lose gradients do not run again."""
        if stage.name not in self._networks:
            network, losing = network_of(self.run, stage), set[nn.Module]()
            leaves = self._largest(stage, network)
            with RowGradients(self.run, stage, network, leaves, copy=0).active(losing):
                self._networks[stage.name] = network.without(losing)
        return self._networks[stage.name]

    def _ranks(self, stage: Stage) -> dict[str, int]:
        """Site → the largest rank that its merged change may have."""
        changes, most = self.run.lockstep.changes, self.run.job.rank
        own = {site: min(changes[site].rank, *changes[site].shape) for site in stage.sites}
        return {s: min(rank, most if isinstance(most, int) else rank) for s, rank in own.items()}

    def _largest(self, stage: Stage, network: Network) -> dict[str, LowRank]:
        """Leaves like those of merged changes of these ranks."""
        found = dict[str, LowRank]()
        for site, rank in self._ranks(stage).items():
            like = self.run.lockstep.changes[site]
            up, down = (
                torch.zeros(*shape, device=network.device, requires_grad=True)
                for shape in ((like.shape[0], rank), (rank, like.shape[1]))
            )
            found[site] = LowRank(up, down, like.like.kernel)
        return found

    def trained(self, merged: Merged, bound: float | None) -> Merged:
        """``merged`` after the steps, within :func:`.fitting.bounds_of` a ``bound``."""
        job, lockstep = self.run.job, self.run.lockstep
        closed_form = {site: solution.change for site, solution in merged.sites.items()}
        after = lockstep.merged = dict(closed_form)
        notes = dict(self._left_out)
        known = [seen.stage.name for seen in job.trace.stages if _is_trained(seen.stage)]
        known, trained = [name for name in known if name not in notes], 0
        self._expect()
        try:
            for stage in self.run.stages() if known or not notes else ():
                if stage.feeds_next:
                    rows = job.at_once(job.thresholds.batch, 2, stage=stage.name)
                    for batch in micro_batches(stage, 2, None, ExecutionConfig(rows)):
                        lockstep.run(batch)
                elif _is_trained(stage) and stage.name not in notes:
                    before, trained = trained, trained + 1
                    counts = before * self.steps, max(len(known), trained) * self.steps
                    changes, notes[stage.name] = self._of_stage(stage, *counts)
                    limits = bounds_of(job, bound, stage)
                    for site, change in changes.items():
                        over = change.squared_norm() ** 0.5 / max(limits[site], 1e-30)
                        after[site] = change.scaled(1 / max(over, 1.0))
                if self.stopped is not None:
                    break
        except BaseException as error:
            notes[""] = self._ended(error, "before the next")
        none = "none, because the LoRAs change no part that gives an image"
        job.report.note("steps", *(notes.values() or [none]))
        job.eta.expect(WHAT, [])
        ran, sites = {} if self.taken else {"steps": 0}, dict(merged.sites)
        for site, solution in merged.sites.items():
            like = solution.change.up
            sites[site] = replace(solution, change=after[site].to(like.dtype, like.device))
        before = closed_form if self.taken else {}
        return replace(merged, sites=sites, before=before, ran=ran, stopped=self.stopped)

    def _of_stage(self, stage: Stage, start: int, total: int) -> tuple[dict[str, LowRank], str]:
        """The changes of a stage's sites after as many steps as can be taken, empty if there are
        none, and a note on them. Steps count from ``start`` on, out of a ``total``."""
        job, done = self.run.job, 0
        leaves, end = dict[str, LowRank](), f"{stage.name}: {self.steps} taken"
        try:
            if stage.name in self._fits:
                job.host.free_memory(self._fits[stage.name][1])
            network = self._network(stage)
            merged = self.run.lockstep.merged  # without repairs where nothing drifts
            for site in (site for site in stage.sites if site in merged):
                leaves[site] = _leaves(merged[site], network.device)
            gradients = RowGradients(self.run, stage, network, leaves)
            with gradients.active():
                job.tick(WHAT, start, total)
                for done in self._take(gradients, stage):
                    job.tick(WHAT, start + done, total)
        except BaseException as error:
            end = f"{stage.name}: {self._ended(error, f'after {done} of {self.steps}')}"
        self.taken += done
        changes = {
            s: LowRank(of.up.detach(), of.down.detach(), of.kernel) for s, of in leaves.items()
        }
        return changes if done else {}, end

    def _ended(self, error: BaseException, when: str) -> str:
        """What ended the steps, and when; raises what ends the merge."""
        if self.run.job.rescues and self._cancels(error):
            self.stopped = error.with_traceback(None)  # whose frames hold tensors
            return f"stopped {when}"
        if self._cancels(error) or not isinstance(error, Exception):
            raise error
        ended = f"ended {when}, {brief(error)}"
        _log.warning("%s: %s", WHAT, ended)
        return ended

    def _cancels(self, error: BaseException) -> bool:
        job = self.run.job
        stops = isinstance(error, (KeyboardInterrupt, *job.host.interrupts))
        return stops or job.eta.cancelled

    def _take(self, gradients: RowGradients, stage: Stage) -> Iterator[int]:
        """Take the steps; yields how many are taken."""
        thresholds, seed = self.run.job.thresholds, self.run.job.calibration.seed
        batch = thresholds.batch
        at_once, _ = self._fits.get(stage.name, (batch, 0))
        gradients.weigh(torch.Generator().manual_seed(seed))
        groups = [
            {"params": [leaf], "lr": thresholds.rate * float(leaf.detach().square().mean().sqrt())}
            for leaf in gradients.leaves
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        falling = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1.0, (step + 1) / _WARM) * (1 - step / self.steps)
        )
        keys = [row.key for row in stage.rows]
        order, generator = list[int](), torch.Generator().manual_seed(seed)
        for step in range(self.steps):
            while len(order) < batch:
                order += torch.randperm(len(stage.rows), generator=generator).tolist()
            rows, order = order[:batch], order[batch:]

            def add(at_once: int, rows: Sequence[int] = rows, step: int = step) -> None:
                gradients.clear()
                for some in chunks(rows, keys, at_once):
                    gradients.add(sorted(some), first=step < _WARM)

            while True:
                _, at_once = with_less(halved(at_once), add, _complaint)
                if gradients.settled():
                    break
                if not gradients.lower():
                    raise SolveError("since its gradients are not finite")
            adam.step()
            falling.step()
            yield step + 1


def _complaint(said: str, tried: object) -> str:
    return f"out of memory for one row ({said})"


def _leaves(change: LowRank, device: torch.device) -> LowRank:
    """Its factors, of equal size in every component, as float32 leaves on a device."""
    with torch.inference_mode(False):
        even, _ = truncate_factors(change.to(torch.float32), change.rank)
        up, down = even.up.to(device).requires_grad_(), even.down.to(device).requires_grad_()
    return LowRank(up, down, change.kernel)
