"""Progress of a merge and an estimate of the time left, from what is measured as it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

_FIRST = 0.005  # of a kind of work: until so much is measured, what was expected counts as well


@dataclass(frozen=True)
class Progress:
    """A step of a merge: ``done`` of ``total`` of ``what``, a few words such as "solving sites".

    ``seconds`` have passed since the merge began, and the whole of it takes about ``left`` more
    (None: too little is known yet). A message of its own has a ``total`` of 0; ``plan`` is the line
    of the memory plan that it brings. As text it is a line for a person.
    """

    what: str
    done: int = 0
    total: int = 0
    seconds: float = 0.0
    left: float | None = None
    share: float = 0.0
    """The share of the whole merge's time, from 0 to 1; it never goes back."""
    plan: str = ""

    def __str__(self) -> str:
        count = f" {self.done} of {self.total}" if self.total > 1 else ""
        return ", ".join(filter(None, (f"{self.what}{count}", self.time_left)))

    @property
    def time_left(self) -> str:
        """Such as "about 3 min left"; empty while too little is known."""
        return "" if self.left is None else f"about {duration(self.left)} left"


OnProgress = Callable[[Progress], None]
"""``on_progress(progress)`` is called at every step of a merge."""


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Kind:
    """Work of one kind: the seconds that are expected of each of its ``parts`` to come, and how
    many of those are done (``ahead`` were expected of them) and how long they ``took``. Kinds of
    one ``family`` are as much quicker or slower than expected."""

    family: Hashable = None
    parts: dict[Hashable, float] = field(default_factory=dict[Hashable, float])
    ahead: float = 0.0
    took: float = 0.0
    known: bool = True

    @property
    def to_come(self) -> float:
        return sum(self.parts.values())


class Forecast:
    """The time that a run has left, by kinds of work.

    What each part of a kind takes is expected beforehand, in seconds or, where it is not ``known``,
    in any unit; by what the done parts of the kind took, those to come are corrected.
    ``on_progress`` gets every step, with the time that is left then.
    """

    def __init__(
        self, on_progress: OnProgress | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock, self._on_progress = clock, on_progress
        self._began = self._mark = clock()
        self._kinds: dict[Hashable, _Kind] = {}
        self._phase, self._phase_began, self._share = "", 0.0, 0.0

    def expect(
        self,
        kind: Hashable,
        parts: Mapping[Hashable, float],
        family: Hashable = None,
        *,
        known: bool = True,
    ) -> None:
        """So many seconds for each of the ``parts`` to come, in place of what was expected."""
        found = self._kinds.setdefault(kind, _Kind())
        found.parts.update(parts)
        found.known, found.family = known, family

    def drop(self, kind: Hashable) -> None:
        """Expect nothing more of a kind."""
        if kind in self._kinds:
            self._kinds[kind].parts.clear()

    def mark(self) -> None:
        """Begin now what is :meth:`spent` next."""
        self._mark = self.clock()

    def spent(self, kind: Hashable, part: Hashable, share: float = 1.0) -> None:
        """Since the last mark this ``share`` of what is to come of a part was done; mark."""
        now = self.clock()
        found = self._kinds.get(kind)
        if found is not None and found.parts.get(part):
            amount = found.parts[part] * share
            found.parts[part] -= amount
            found.ahead += amount
            found.took += now - self._mark
        self._mark = now

    def tick(self, what: str, done: int, total: int, plan: str = "") -> None:
        """``done`` of ``total`` of ``what``, which is a kind of its own where it was expected to be
        or where it is all that is known."""
        now = self.clock()
        if what != self._phase and total:
            self._end_phase()
            self._phase, self._phase_began = what, now
        if total and (what in self._kinds or not self._kinds):
            self._part_done(what, done / total, now - self._phase_began)
        seconds, left = now - self._began, self.left()
        if left is not None and seconds + left > 0:
            self._share = max(self._share, min(seconds / (seconds + left), 1.0))
        if self._on_progress is not None:
            self._on_progress(Progress(what, done, total, seconds, left, self._share, plan))

    def left(self) -> float | None:
        """Seconds; None where some of the work is not known, or nothing is expected."""
        found = [self.left_of(kind) for kind, some in self._kinds.items() if some.to_come]
        return None if not found or None in found else sum(filter(None, found))

    def left_of(self, kind: Hashable) -> float | None:
        """Seconds of one kind; None where they are not known."""
        found = self._kinds.get(kind, _Kind())
        if not found.known:
            return found.to_come * found.took / found.ahead if found.ahead else None
        weight = _FIRST * (found.ahead + found.to_come)
        rate = self._rate_of(found.family)
        return found.to_come * (found.took + rate * weight) / max(found.ahead + weight, 1e-30)

    def _rate_of(self, family: Hashable) -> float:
        """Seconds for each that was expected, of all kinds of a family; 1 before any is done."""
        some = [kind for kind in self._kinds.values() if kind.known and kind.family == family]
        ahead, took = (sum(getattr(kind, of) for kind in some) for of in ("ahead", "took"))
        weight = _FIRST * (ahead + sum(kind.to_come for kind in some))
        return (took + weight) / (ahead + weight) if family and weight else 1.0

    def _part_done(self, what: str, share: float, seconds: float) -> None:
        kind = self._kinds.setdefault(what, _Kind(parts={"": 1.0}, known=False))
        whole = kind.ahead + kind.to_come
        kind.ahead, kind.took, kind.parts = whole * share, seconds, {"": whole * (1 - share)}

    def _end_phase(self) -> None:
        kind = self._kinds.get(self._phase)
        if kind is not None:
            kind.ahead += kind.to_come
            kind.parts.clear()
