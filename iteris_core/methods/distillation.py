"""Steps through the whole denoiser, from the closed form on.

The closed form fits every layer by itself, and no layer sees how others combine its error. Here all
merged factors of a denoiser are trained together on what it does to the merge's own rows
(:mod:`.row_gradients`), by Muon (K. Jordan 2024): a factor's update is its momentum with all
singular values made equal. It stays in the span of the gradients. Adam moves every entry by about
its rate, also in input directions without energy, and its first steps undo more of the closed form
than they improve.

Text encoders stay as the closed form left them: on the toybox five LoRAs keep .98 with the merged
text encoder and their own denoiser, and .43 the other way round.

What ends the steps early loses neither those taken by then nor the merge: memory that runs out, a
model that cannot be differentiated, gradients that are not finite, or the user.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import nn

from ..activations.gradients import Network
from ..activations.host_pool import free_host
from ..activations.memory import halved, is_apart, is_out_of_memory, with_less
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
_WARM = 5
"""Steps until the learning rate is full."""
_AS_ADAM = 5.0
"""By this torch divides the root mean square of Muon's updates, to match that of Adam's."""
_STATE = 16
"""Bytes of a number of a factor, its gradient, its momentum and its update."""
_ENOUGH = 4
"""With fewer rows at once, a step is quicker with more of them and blocks that run again."""
_ROOM = 8
"""A forward's memory, this many times, is kept free for the first measurement."""
_log = logging.getLogger(__name__)


class _Fit(NamedTuple):
    """So many ``rows`` of a stage at once, ``size`` bytes, or that of one where none fits; whether
    blocks run again."""

    rows: int
    replays: bool
    size: int


@dataclass
class Distillation:
    """The steps of every denoiser of a ``run``. ``taken`` counts those of all, and ``stopped``
    is what the user stopped them by if the job rescues its merge then."""

    run: Run
    steps: int = field(init=False)
    taken: int = 0
    stopped: BaseException | None = None
    _fits: dict[str, _Fit] = field(default_factory=dict[str, "_Fit"])
    _left_out: dict[str, str] = field(default_factory=dict[str, str])
    """Stage → a note, where not even one row fits."""
    _networks: dict[str, Network] = field(default_factory=dict[str, Network])

    def __post_init__(self) -> None:
        self.steps = self.run.job.steps
        self._expect()

    def _within_time(self) -> None:
        """Take fewer steps if the time that a merge may take is shorter than what is left of it."""
        job, minutes = self.run.job, self.run.job.calibration.minutes
        left = job.eta.left()
        if minutes is None or left is None or job.eta.rate is None:
            return
        each = job.eta.rate * sum(job.steps_work.values())
        late = job.eta.seconds + left - 60 * minutes
        if late > 0 and each > 0:
            self.steps = max(self.steps - math.ceil(late / each), 0)
            self._expect()

    def _expect(self) -> None:
        """Expect the work of all stages that are not left out."""
        job = self.run.job
        work = [of for name, of in job.steps_work.items() if name not in self._left_out]
        job.eta.expect(WHAT, [self.steps * of for of in work])

    def plan(self, stage: Stage, before: Sequence[Stage]) -> str:
        """Plan the steps of a ``stage``, after the stages ``before`` it, within the memory budget.
        Returns the plan in words; empty without a budget."""
        if self.run.job.memory_budget is None or not stage.is_denoiser:
            return ""
        name, batch = f"steps through the {stage.name}", self.run.job.thresholds.batch
        try:
            (fit, budget), _ = with_less([(stage, before)], self._fitting, _complaint)
            gib, free = fit.size / 2**30, budget / 2**30
            again = ", blocks run again" * fit.replays
            line = f"{name}: {fit.rows} of {batch} rows at once{again}, {gib:.2f} of {free:.2f} GiB"
            why = "" if fit.rows else f", one row needs {gib:.3g} of {free:.3g} GiB"
            self._fits[stage.name] = fit
        except Exception as error:
            if self._cancels(error):
                raise
            line, why = "", f": {brief(error)}"
        if why:
            line = self._left_out[stage.name] = f"{name}: left out{why}"
            _log.warning("%s", line)
        self._expect()
        return line

    def _fitting(self, given: tuple[Stage, Sequence[Stage]]) -> tuple[_Fit, int]:
        """How a step's rows fit into memory, and the budget. If few of them do with all
        activations, blocks run again."""
        (stage, before), job, lockstep = given, self.run.job, self.run.lockstep
        fixed = sum(
            _STATE * rank * sum(lockstep.changes[site].shape)
            for site, rank in self._ranks(stage).items()
        )
        fixed += left_by(job, (*before, stage), 2)
        forward = [of.forward for of in job.trace.stages if of.stage.name == stage.name]
        allowed(job, fixed + sum(_ROOM * (of.running + of.forward) for of in forward))
        network = self._network(stage)
        fits = list[tuple[_Fit, int]]()
        for network.replays in (False, True):
            try:
                fits.append(self._measured(stage, network, fixed))
            except Exception as error:
                if network.replays or not is_out_of_memory(error):
                    raise
                continue
            if fits[-1][0].rows >= min(_ENOUGH, job.thresholds.batch):
                break
        return max(fits, key=lambda of: of[0].rows)

    def _measured(self, stage: Stage, network: Network, fixed: int) -> tuple[_Fit, int]:
        """The fit by the measured cost of one row and of two, beside ``fixed`` bytes, and the
        budget."""
        job, batch = self.run.job, self.run.job.thresholds.batch
        gradients = RowGradients(self.run, stage, network, self._largest(stage, network), copy=0)
        with gradients.active():
            one = gradients.peak(1)
        fixed += self.run.lockstep.cast_bytes
        budget, each = allowed(job, fixed + batch * one), one
        if fixed + 2 * one <= budget:  # two show what does not grow with the number of rows
            with gradients.active():
                each = min(max(gradients.peak(2) - one, 0), one)
        sizes = [fixed + one + more * each for more in range(batch)]
        rows = sum(size <= budget for size in sizes)
        return _Fit(rows, network.replays, sizes[max(rows, 1) - 1]), budget

    def _network(self, stage: Stage) -> Network:
        """The stage's, found once: blocks that would lose gradients do not run again."""
        if stage.name not in self._networks:
            network, losing = network_of(self.run, stage), set[nn.Module]()
            leaves = self._largest(stage, network)
            with RowGradients(self.run, stage, network, leaves, copy=0).active(losing):
                network.replayable -= losing
            self._networks[stage.name] = network
        return self._networks[stage.name]

    def _ranks(self, stage: Stage) -> dict[str, int]:
        """Site → the largest rank that its merged change may have."""
        changes = self.run.lockstep.changes
        return {site: self.run.job.largest_rank(changes[site]) for site in stage.sites}

    def _largest(self, stage: Stage, network: Network) -> dict[str, LowRank]:
        """Leaves like those of merged changes of these ranks."""
        leaves = dict[str, LowRank]()
        for site, rank in self._ranks(stage).items():
            like = self.run.lockstep.changes[site]
            out, width = like.shape
            zeros = LowRank(torch.zeros(out, rank), torch.zeros(rank, width), like.like.kernel)
            leaves[site] = _leaves(zeros, network.device)
        return leaves

    def trained(self, merged: Merged, bound: float | None) -> Merged:
        """``merged`` after the steps, within :func:`.fitting.bounds_of` a ``bound``."""
        job, lockstep = self.run.job, self.run.lockstep
        after = lockstep.merged = {site: of.change for site, of in merged.sites.items()}
        notes = dict(self._left_out)
        known = [seen.stage.name for seen in job.trace.stages if seen.stage.is_denoiser]
        known, trained = [name for name in known if name not in notes], 0
        self._expect()
        self._within_time()
        ran = {} if self.steps == job.steps else {"steps": self.steps}
        try:
            for stage in self.run.stages() if self.steps and (known or not notes) else ():
                if stage.feeds_next:
                    rows = job.at_once(job.thresholds.batch, 2, stage=stage.name)
                    for batch in micro_batches(stage, 2, None, ExecutionConfig(rows)):
                        lockstep.run(batch)
                elif stage.is_denoiser and stage.name not in notes:
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
        if not self.steps:
            none = f"none, because {job.calibration.minutes:g} min are over"
        job.report.note("steps", *(notes.values() or [none]))
        job.eta.expect(WHAT, [])
        before = replace(merged, ran={"steps": 0}, stopped=self.stopped)
        if not self.taken:
            return before
        every, sites = max(len(known), 1) * self.steps, dict(merged.sites)
        for site, solution in merged.sites.items():
            like = solution.change.up
            if after[site] is not solution.change:  # whose errors are those of the closed form
                change = after[site].to(like.dtype, like.device)
                sites[site] = replace(solution, change=change, errors=None)
        partial = f"{self.taken} of {every} steps" if self.taken < every else ""
        return Merged(sites, before, ran, partial, self.stopped)

    def _of_stage(self, stage: Stage, start: int, total: int) -> tuple[dict[str, LowRank], str]:
        """The changes of a stage's sites after as many steps as can be taken, empty if there are
        none, and a note on them. Steps count from ``start`` on, out of a ``total``."""
        job, done = self.run.job, 0
        leaves, end = dict[str, LowRank](), f"{stage.name}: {self.steps} taken"
        try:
            network = self._network(stage)
            if stage.name in self._fits:
                job.host.free_memory(self._fits[stage.name].size)
                network.replays = self._fits[stage.name].replays
            merged = self.run.lockstep.merged  # without repairs where nothing drifts
            for site in (site for site in stage.sites if site in merged):
                even, _ = truncate_factors(merged[site].to(torch.float32), merged[site].rank)
                leaves[site] = _leaves(even, network.device)
            gradients = RowGradients(self.run, stage, network, leaves, room=self._room(stage))
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

    def _room(self, stage: Stage) -> int:
        """Bytes of main memory for the targets of rows, beside the steps of a ``stage``."""
        apart, budget = is_apart(self._network(stage).device), self.run.job.memory_budget
        used = 0 if apart or stage.name not in self._fits else self._fits[stage.name].size
        left = free_host() - used
        return max(min(left, budget - used) if isinstance(budget, int) and not apart else left, 0)

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
        fit = self._fits.get(stage.name, _Fit(batch, gradients.network.replays, 0))
        way = fit.rows, fit.replays
        gradients.weigh(torch.Generator().manual_seed(seed))
        if not hasattr(torch.optim, "Muon"):
            raise SolveError(
                f"since PyTorch {torch.__version__} has no Muon; 2.9 and later have it"
            )
        sizes = (float(leaf.detach().square().mean().sqrt()) for leaf in gradients.leaves)
        groups = [
            {"params": [leaf], "lr": _AS_ADAM * thresholds.rate * size}
            for leaf, size in zip(gradients.leaves, sizes, strict=True)
        ]
        muon = torch.optim.Muon(
            groups, momentum=0.9, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
        )
        falling = torch.optim.lr_scheduler.LambdaLR(
            muon, lambda step: min(1.0, (step + 1) / _WARM) * (1 - step / self.steps)
        )
        keys = [row.key for row in stage.rows]
        order, generator = list[int](), torch.Generator().manual_seed(seed)
        for step in range(self.steps):
            while len(order) < batch:
                order += torch.randperm(len(stage.rows), generator=generator).tolist()
            rows, order = order[:batch], order[batch:]

            def add(way: tuple[int, bool], rows: Sequence[int] = rows, step: int = step) -> None:
                gradients.clear()
                at_once, gradients.network.replays = way
                for some in chunks(rows, keys, at_once):
                    gradients.add(sorted(some), first=step < _WARM)

            while True:
                ways = [(count, way[1]) for count in halved(way[0])]
                ways += [] if way[1] else [(count, True) for count in halved(batch)]
                _, way = with_less(ways, add, _complaint)
                if gradients.settled():
                    break
                if not gradients.lower():
                    raise SolveError("since its gradients are not finite")
            muon.step()
            falling.step()
            yield step + 1


def _complaint(said: str, tried: object) -> str:
    return f"out of memory for one row ({said})"


def _leaves(change: LowRank, device: torch.device) -> LowRank:
    """The factors of ``change`` as float32 leaves on ``device``, also in inference mode."""
    with torch.inference_mode(False):
        up, down = (
            factor.detach().clone().to(device, torch.float32).requires_grad_()
            for factor in (change.up, change.down)
        )
    return LowRank(up, down, change.kernel)
