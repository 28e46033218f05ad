"""What a merge has before it, in seconds: the rows' forwards to each site, its moments, its solve.

A row is expected to take on its way to a site what rows took there while samples were made or,
before that, in the short pass of :mod:`.dry`; moments and solves what their operations take on this
machine. :class:`..progress.Forecast` corrects both by what is measured as the run goes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..activations.lockstep import Lockstep
from ..activations.micro_batch import MicroBatch
from ..activations.pace import Pace
from ..calibration_prompts import context_shares, distinct_prompts
from ..concepts import Calibration, Concept
from ..hosts.protocol import DENOISING, Stage
from ..linalg.precision import solve_device
from ..linalg.rates import seconds_of
from ..progress import Forecast
from ..solve.problem import Work
from .batches import Batching, chunks, limit_of

_FORWARDS, _MOMENTS, _SOLVES, _STAGES = "forwards", "moments", "solves", "stages"
_SHARE = 0.01  # of the forwards, run to know what they take
_EVERY = 0.5  # seconds between two looks at what is to come, which takes milliseconds


@dataclass(frozen=True)
class Plans:
    """What is going to be done at the ``sites``, name → inputs: every row is run ``copies`` times
    in each of ``passes``, and ``work_of(stage)(site, tokens, sweep, shares)`` are the operations at
    a stage's site, where ``shares`` says that the same tokens have come to a site before. In a
    ``sweep`` sites are solved on the way; else tokens are reduced as they stream by."""

    sites: Mapping[str, int]
    work_of: Callable[[Stage], Callable[[str, int, bool, bool], Work]]
    batching: Batching
    sweep: bool = True
    copies: int = 2
    passes: int = 1
    processes: int = 1


class Outlook:
    """Of one merge: ``pace`` is measured in its forwards, and ``forecast`` told what is to come."""

    def __init__(self, forecast: Forecast | None = None) -> None:
        self.forecast = Forecast() if forecast is None else forecast
        self.pace = Pace(self.forecast.clock)
        self._seen: dict[str, Stage] = {}
        self._begun: set[str] = set()
        self._sampled: set[str] = set()
        self._forwards: dict[str, float] = {}
        self._later: dict[str, tuple[float, float]] = {}
        self._plans: Plans | None = None
        self._told = 0.0

    def saw(self, stage: Stage, concepts: Sequence[Concept], calibration: Calibration) -> None:
        """A short pass saw ``stage`` on one sample of each of the ``concepts`` at every step, which
        tells about how many rows it is going to have."""
        seen = Counter(stage.owners)
        if stage.places:
            more = calibration.samples * calibration.timesteps / calibration.denoising_steps
            each = [round(seen[owner] * more) for owner in range(len(concepts))]
        else:
            shares = context_shares(concepts, calibration)
            each = [_texts(*of, calibration) for of in zip(concepts, shares, strict=True)]
        owners = [owner for owner, count in enumerate(each) for _ in range(count)]
        self._seen.setdefault(stage.name, replace(stage, owners=owners, samples=None))

    def expect(self, plans: Plans, loras: int, calibration: Calibration) -> None:
        """Before samples are made: those of so many ``loras``, and the stages that were seen."""
        self._plans = plans
        if not self._seen:
            self.forecast.expect(_STAGES, {"": 1.0}, known=False)
        places = [stage for stage in self._seen.values() if stage.places]
        if places and calibration.latents == "denoising":
            forwards = loras * calibration.samples * calibration.denoising_steps
            forwards *= 2 if calibration.guidance > 1 else 1
            a_row = sum(self._a_row(self._sites(stage)) for stage in places) / len(places)
            self.forecast.expect(DENOISING, {"": forwards / plans.processes * a_row})
        self._tell()
        self.forecast.refresh = self._refresh

    def later(self, what: str, forwards: float = 0.0, of_rows: float = 0.0) -> None:
        """Behind the sites comes ``what``, which takes so many ``forwards`` of a row, and so many
        of every row."""
        self._later[what] = forwards, of_rows

    def samples_begin(self) -> None:
        self.pace.restart()

    def samples_end(self) -> None:
        self._sampled = set(self.pace.reached)
        self.forecast.drop(DENOISING)

    def run_some(self, stage: Stage, lockstep: Lockstep, at_once: int) -> None:
        """Where no samples were made by forwards, run a share of the rows, ``at_once`` at most: a
        row or two alone do not tell what many take at once."""
        plans = self._plans
        if plans is None or self._is_sampled(stage):
            return
        count = min(at_once, round(_SHARE * _mine(stage, plans) * plans.copies * plans.passes))
        if count > 1:
            rows = next(chunks(range(len(stage.owners)), stage.kinds, count))
            owners = [stage.owners[row] for row in rows]
            self.pace.restart()
            lockstep.run(MicroBatch(lambda: stage.run(rows, 1), owners, 1))
            self._sampled |= set(self.pace.reached)

    def planned(self, stage: Stage, batching: Batching, seconds: float, slower: float) -> float:
        """Seconds of the whole stage, of which its forwards take so many by what a row or two did.

        What was measured with many rows at once is better, but for how much ``slower`` the rows run
        than that.
        """
        plans = self._plans
        if plans is None:
            return seconds
        plans = replace(plans, batching=batching)
        if self._is_sampled(stage):
            rows = _mine(stage, plans) * plans.copies * plans.passes
            seconds = rows * self._a_row(stage.sites) * slower
        self._forwards[stage.name] = seconds
        return seconds + plans.passes * sum(sum(pair) for pair in self._work(stage, plans).values())

    def begin(self, stage: Stage, batching: Batching) -> None:
        """A stage begins, or begins again: what was expected of it is replaced."""
        if self._plans is not None:
            self._begun.add(stage.name)
            self._seen[stage.name] = stage
            self.forecast.drop(_STAGES)
            self._expect(stage, replace(self._plans, batching=batching))
            self._expect_later()
        self.pace.wait()
        self.forecast.mark()

    def reached(self, stage: Stage, site: str) -> None:
        """All rows have come to ``site`` since the last of these three."""
        self._spent((_FORWARDS, stage.name), (0, site))

    def reduced(self, stage: Stage, site: str) -> None:
        self._spent((_MOMENTS, stage.name), (0, site))

    def solved(self, stage: Stage, site: str, turn: int = 0) -> None:
        self._spent((_SOLVES, stage.name), (turn, site))

    def ran(self, stage: Stage, done: int, total: int, turn: int = 0) -> None:
        """The last of ``done`` of ``total`` batches has streamed by."""
        self._spent((_FORWARDS, stage.name), (turn, ""), 1 / (total - done + 1))

    def _spent(self, kind: Hashable, part: Hashable, share: float = 1.0) -> None:
        """Record the time once the device has finished, so that work is measured, not launches."""
        self.pace.wait()
        self.forecast.spent(kind, part, share)

    def _is_sampled(self, stage: Stage) -> bool:
        return set(stage.sites) <= self._sampled

    def _refresh(self) -> None:
        now = self.forecast.clock()
        if now - self._told > _EVERY:
            self._told = now
            self._tell()

    def _tell(self) -> None:
        assert self._plans is not None
        for name, stage in self._seen.items():
            if name not in self._begun:
                self._expect(replace(stage, sites=self._sites(stage)), self._plans)
        self._expect_later()

    def _sites(self, stage: Stage) -> list[str]:
        """Those of a stage that was seen, with what a method has added to its part of the model."""
        assert self._plans is not None
        others = {s for other in self._seen.values() if other is not stage for s in other.sites}
        parts = {_part(site) for site in stage.sites}
        return [s for s in self._plans.sites if _part(s) in parts and s not in others]

    def _expect(self, stage: Stage, plans: Plans) -> None:
        work = self._work(stage, plans)
        a_row = {site: self._a_row([site]) for site in stage.sites}
        whole = sum(a_row.values())
        rows = _mine(stage, plans) * plans.copies
        forwards = self._forwards.get(stage.name, 0.0) / plans.passes or rows * whole
        parts: dict[str, dict[Hashable, float]] = {_FORWARDS: {}, _MOMENTS: {}, _SOLVES: {}}
        for turn in range(plans.passes):
            for site, seconds in a_row.items():
                share = seconds / whole if whole else 1 / len(a_row)
                run = (forwards or 1.0) * share
                moments, solve = work[site]
                parts[_SOLVES][turn, site] = solve
                if plans.sweep:
                    parts[_FORWARDS][turn, site] = run
                    parts[_MOMENTS][turn, site] = moments
                else:  # the first pass of several is of reference rows alone
                    run *= 0.5 if plans.passes > 1 and turn == 0 else 1.0
                    before = parts[_FORWARDS].get((turn, ""), 0.0)
                    parts[_FORWARDS][turn, ""] = before + run + moments
        for kind, some in parts.items():
            self.forecast.drop((kind, stage.name))
            known = bool(forwards) or kind != _FORWARDS
            self.forecast.expect((kind, stage.name), some, known=known)

    def _expect_later(self) -> None:
        """By the rows of the last stage."""
        if self._later and self._seen:
            stage = list(self._seen.values())[-1]
            a_row = self._a_row(stage.sites)
            for what, (forwards, of_rows) in self._later.items():
                seconds = (forwards + of_rows * len(stage.owners)) * a_row
                self.forecast.expect(what, {"": seconds or 1.0}, known=bool(seconds))

    def _work(self, stage: Stage, plans: Plans) -> dict[str, tuple[float, float]]:
        """Seconds of each site's moments and solve."""
        limit, rows = limit_of(stage, plans.batching), _mine(stage, plans)
        device, work_at = self.pace.device, plans.work_of(stage)
        found: dict[str, tuple[float, float]] = {}
        for site in stage.sites:
            reached = self.pace.of(site)
            length = 0 if reached is None else reached.tokens
            of_row = length if limit is None else min(length, limit(plans.sites[site]))
            shares = reached is not None and reached.shares
            work = work_at(site, rows * of_row, plans.sweep, shares)
            moments = seconds_of(work.moments, device)
            found[site] = moments, seconds_of(work.solve, solve_device(device))
        return found

    def _a_row(self, sites: Sequence[str]) -> float:
        """Seconds for a row's way to all of them."""
        return sum(found.of_row for found in map(self.pace.of, sites) if found is not None)


def _mine(stage: Stage, plans: Plans) -> int:
    """Rows of this process."""
    rows = len(stage.owners)
    return rows if stage.feeds else -(-rows // plans.processes)


def _part(site: str) -> str:
    return site.partition(".")[0]


def _texts(concept: Concept, contexts: float, calibration: Calibration) -> int:
    """About how many prompts of a concept differ, the empty one among them."""
    pool = distinct_prompts(concept, calibration)
    if concept.lora is None:
        return pool
    of_rows = calibration.samples * calibration.timesteps * (1 - calibration.empty_share)
    plain = min(calibration.samples, pool)
    return round(plain + contexts * of_rows) + (calibration.empty_share > 0)
