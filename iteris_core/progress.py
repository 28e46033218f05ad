"""Progress of a merge, and an estimate of the time left from measurements as it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

_FIRST = (
    0.005  # seconds per kind of work: until this much is measured, the expectation counts as well
)


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


OnProgress = Callable[[Progress], None]
"""``on_progress(progress)`` is called at every step of a merge."""


def duration(seconds: float) -> str:
    """Seconds as readable text."""
    if seconds < 90:
        return f"{max(round(seconds), 1)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@dataclass
class _Kind:
    """Work of one kind: the expected seconds of each of its remaining ``parts``, how many are done,
    how long these were expected to take (``ahead``), and how long they ``took``. Kinds in one
    ``family`` share the ratio between actual and expected time."""

    family: Hashable = None
    parts: dict[Hashable, float] = field(default_factory=dict[Hashable, float])
    ahead: float = 0.0
    took: float = 0.0
    known: bool = True

    @property
    def to_come(self) -> float:
        return sum(self.parts.values())


class Forecast:
    """Estimates the time that a run has left, by kinds of work.

    Each part has an expected time, in seconds or, unless ``known``, in any unit. The time that
    finished parts took corrects the estimate for the remaining ones. ``on_progress`` gets every
    step with the time left.
    """

    def __init__(
        self, on_progress: OnProgress | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.clock, self._on_progress = clock, on_progress
        self._began = self._mark = clock()
        self._kinds: dict[Hashable, _Kind] = {}
        self._phase, self._phase_began, self._share = "", 0.0, 0.0
        self._last: Progress | None = None

    def expect(
        self,
        kind: Hashable,
        parts: Mapping[Hashable, float],
        family: Hashable = None,
        *,
        known: bool = True,
    ) -> None:
        """Set the expected seconds of the remaining ``parts``, replacing earlier expectations."""
        found = self._kinds.setdefault(kind, _Kind())
        found.parts.update(parts)
        found.known, found.family = known, family

    def drop(self, kind: Hashable) -> None:
        """Expect no more work of this kind."""
        if kind in self._kinds:
            self._kinds[kind].parts.clear()

    def mark(self) -> None:
        """Start timing the work that :meth:`spent` reports next."""
        self._mark = self.clock()

    def spent(self, kind: Hashable, part: Hashable, share: float = 1.0) -> None:
        """Record that this ``share`` of a part was done since the last mark; mark again."""
        now = self.clock()
        found = self._kinds.get(kind)
        if found is not None and found.parts.get(part):
            amount = found.parts[part] * share
            found.parts[part] -= amount
            found.ahead += amount
            found.took += now - self._mark
        self._mark = now

    def tick(self, what: str, done: int, total: int, plan: str = "") -> None:
        """Report ``done`` of ``total`` for ``what``. It counts as a kind of work if it was
        expected, or if nothing else is known."""
        now = self.clock()
        if what != self._phase and total:
            self._end_phase()
            self._phase, self._phase_began = what, now
        if total and (what in self._kinds or not self._kinds):
            self._part_done(what, done / total, now - self._phase_began)
        seconds, left = now - self._began, self.left()
        if left is not None and seconds + left > 0:
            self._share = max(self._share, min(seconds / (seconds + left), 1.0))
        self._last = Progress(what, done, total, seconds, left, self._share, plan)
        if self._on_progress is not None:
            self._on_progress(self._last)

    def end(self) -> None:
        """Report the last step again, with nothing left."""
        if self._on_progress is not None and self._last is not None:
            seconds = self.clock() - self._began
            self._on_progress(replace(self._last, seconds=seconds, left=0.0, share=1.0, plan=""))

    def left(self) -> float | None:
        """Seconds; None if some of the work is unknown, or nothing is expected."""
        found = [self.left_of(kind) for kind, some in self._kinds.items() if some.to_come]
        return None if not found or None in found else sum(filter(None, found))

    def left_of(self, kind: Hashable) -> float | None:
        """Seconds for one kind; None if unknown."""
        found = self._kinds.get(kind, _Kind())
        if not found.known:
            return found.to_come * found.took / found.ahead if found.ahead else None
        weight = _FIRST * (found.ahead + found.to_come)
        rate = self._rate_of(found.family)
        return found.to_come * (found.took + rate * weight) / max(found.ahead + weight, 1e-30)

    def _rate_of(self, family: Hashable) -> float:
        """Actual seconds per expected second over all kinds of a family; 1 before any is done."""
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
