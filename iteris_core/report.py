"""What a merge did, per site and per concept, as data and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class SiteReport:
    """One site. Sequences run over the concepts, as in :class:`.solve.Solution`."""

    rank: int
    balance: Sequence[float] = ()
    before: Sequence[float] = ()
    after: Sequence[float] = ()
    condition: float = math.nan
    truncated: float = 0.0


@dataclass(frozen=True)
class MergeReport:
    """``sites`` in execution order; ``convergence`` is the largest relative change of a site in
    each Jacobi iteration; ``settings`` and ``calibration`` are what was asked for; ``notes`` say by
    concept what was left out or extracted when its file was read, and which names it shares."""

    method: str
    concepts: Sequence[str]
    sites: Mapping[str, SiteReport]
    seconds: float
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: Mapping[str, Sequence[str]] = field(default_factory=dict[str, Sequence[str]])
    rows: int = 0
    convergence: Sequence[float] = ()

    def residuals(self) -> list[tuple[float, float]]:
        """(before, after) of every concept: root mean square over the sites."""

        def mean(index: int, name: str) -> float:
            values = [getattr(site, name)[index] for site in self.sites.values() if site.after]
            return math.sqrt(sum(v * v for v in values) / len(values)) if values else math.nan

        return [(mean(i, "before"), mean(i, "after")) for i in range(len(self.concepts))]

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        data["residuals"] = {
            name: {"before": before, "after": after}
            for name, (before, after) in zip(self.concepts, self.residuals(), strict=True)
        }
        return data

    def summary(self) -> str:
        """Two or three lines for a person."""
        ranks = sorted({site.rank for site in self.sites.values()})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        lines = [
            f"Merged {len(self.concepts)} concepts with {self.method}: {len(self.sites)} sites, "
            f"rank {span}, {self.seconds:.1f} s."
        ]
        if self.rows:
            lines[0] = lines[0][:-1] + f", {self.rows} rows."
        for name, (before, after) in zip(self.concepts, self.residuals(), strict=True):
            if not math.isnan(after):
                lines.append(
                    f"  {name}: output error {after:.0%} of its change (the mean: {before:.0%})"
                )
        for name, notes in self.notes.items():
            lines += [f"  {name}: {note}" for note in notes]
        return "\n".join(lines)
