"""Progress of a merge, and an estimate of the time left: work done over the time that it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

_FIRST = 0.05  # share of a phase until which the rate of all work counts as well


@dataclass(frozen=True)
class Progress:
    """A step of a merge: ``done`` of ``total`` steps of ``what``, such as "solving sites".

    ``seconds`` have passed since the merge began, and about ``left`` remain for the whole merge
    (None: not known yet). A bare message has ``total`` 0; ``plan`` is a new line of the memory
    plan. ``str()`` gives a readable line.
    """

    what: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    left: float | None = None
    share: float = 0.0
    """Share of the whole merge's time, from 0 to 1; it never decreases."""
    plan: str = ""

    def __str__(self) -> str:
        count = f" {self.done} of {self.total}" if self.total > 1 else ""
        return ", ".join(filter(None, (f"{self.what}{count}", self.time_left)))

    @property
    def time_left(self) -> str:
        """For example "about 3 min left"; empty until there is an estimate, and at the end."""
        return f"about {duration(self.left)} left" if self.left else ""


OUTLOOK = "whole merge"
"""The ``what`` of the plan's line about the whole merge."""

OnProgress = Callable[[Progress], None]
"""``on_progress(progress)`` is called at every step of a merge."""


def duration(seconds: float) -> str:
    """Seconds as readable text."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Phase:
    """Work by step, the ``share`` of the steps that is done, and the seconds that ``timed`` work
    ``took``: all but the first step's, which may load or compile what later ones use."""

    steps: Sequence[float]
    begun: bool = False
    share: float = 0.0
    timed: float = 0.0
    took: float = 0.0

    @property
    def done(self) -> float:
        whole, part = divmod(self.share * len(self.steps), 1)
        return sum(self.steps[: int(whole)]) + part * sum(self.steps[int(whole) : int(whole) + 1])

    def left(self, rate: float) -> float:
        """Seconds, at this phase's own rate as far as that is known."""
        total, done = sum(self.steps), self.done
        before = _FIRST * total
        pace = (self.took + rate * before) / (self.timed + before) if total else 0.0
        return (total - done) * pace


class Forecast:
    """Reports every step of a run to ``on_progress``, with the time left: what is left of the
    expected work, at the rate at which work was done.

    Work has any unit, such as multiply-adds.
    """

    def __init__(
        self, on_progress: OnProgress | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock, self._on_progress = clock, on_progress
        self._began = self._mark = clock()
        self._phases: dict[str, _Phase] = {}
        self._tried = self._took = self._share = 0.0
        self._last: Progress | None = None
        self._trial, self.cancelled = True, False
        """Whether only a trial was timed, and whether ``on_progress`` has raised in a step."""

    @property
    def what(self) -> str:
        """The last step's name."""
        return "start" if self._last is None else self._last.what

    def did(self, work: float, seconds: float) -> None:
        """Record a trial's work, whose rate counts until steps are timed."""
        self._tried, self._took = self._tried + work, self._took + seconds

    def expect(self, what: str, steps: Sequence[float]) -> None:
        """Expect the phase ``what``, with this work in each of its steps; without steps, no more of
        it. A phase that has begun stays where it is."""
        self._phases.setdefault(what, _Phase(steps)).steps = steps

    def tick(self, what: str, done: int, total: int, plan: str = "") -> None:
        """Report ``done`` of ``total``; it counts as work if it was expected, or nothing was."""
        now, mark = self.clock(), self._mark
        self._mark = now
        if total and (what in self._phases or not self._phases):
            phase = self._phases.setdefault(what, _Phase([1.0]))
            before, share, phase.share = phase.done, phase.share, done / total
            begun, phase.begun = phase.begun, True
            work, took = phase.done - before, now - mark
            if phase.share > share > 0:
                phase.timed, phase.took = phase.timed + work, phase.took + took
                self._trial = False
            elif phase.share > share:
                self.did(work, took)
            elif begun:  # within a step
                self._mark = mark
        seconds, left = now - self._began, self.left()
        if left is not None and seconds + left > 0:
            self._share = max(self._share, min(seconds / (seconds + left), 1.0))
        self._last = Progress(what, done, total, seconds, left, self._share, plan)
        if self._on_progress is not None:
            self.cancelled = True  # unless it returns
            self._on_progress(self._last)
            self.cancelled = False

    def end(self) -> None:
        """Report the last step again, with nothing left."""
        if self._on_progress is not None and self._last is not None:
            self._on_progress(
                replace(
                    self._last, seconds=self.clock() - self._began, left=0.0, share=1.0, plan=""
                )
            )

    @property
    def seconds(self) -> float:
        """Since the merge began."""
        return self.clock() - self._began

    @property
    def rate(self) -> float | None:
        """Seconds per unit of work so far; None before any is done."""
        done, took = self._tried, self._took
        if not self._trial:
            done = sum(phase.timed for phase in self._phases.values())
            took = sum(phase.took for phase in self._phases.values())
        return took / done if done > 0 else None

    def left(self) -> float | None:
        """Seconds; None before any work is done, or if none is expected."""
        if self.rate is None or not self._phases:
            return None
        return sum(phase.left(self.rate) for phase in self._phases.values())
