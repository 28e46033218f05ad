"""The report of a merge, per site and per concept, as data and in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from ..solve.problem import Solution

SETTLED = 1e-3
"""Iterations count as converged below this relative change of every site."""
FEW = 12
"""With fewer prompts per LoRA, errors on them say little about other prompts."""
LITTLE = 0.4
"""A merge that keeps less than this of the LoRAs' effects on held-out rows is little more than
their mean (docs/decisions.md, "What is kept is measured on held-out rows")."""
STRONG = 0.65
"""Two LoRAs keep .67 to .75 by default, five .51 to .63 (``benchmarks/results/bounds_*.json``)."""
BRITTLE = 0.5
"""A use in which less than this share of what is kept at strength 1 is left breaks a merge."""


@dataclass(frozen=True)
class SiteReport:
    """One site. Sequences run over the concepts, as in :class:`.solve.Solution`.

    ``repair`` marks a site that no LoRA changes, see :mod:`.methods.fitting`; it has no ``before``
    and ``after``.
    """

    rank: int
    weighting: Sequence[float] = ()
    before: Sequence[float] = ()
    after: Sequence[float] = ()
    truncated: float = 0.0
    repair: bool = False

    @classmethod
    def of(cls, solution: Solution, concepts: int, *, repair: bool = False) -> SiteReport:
        """The report on a ``solution`` for its first ``concepts``, without generic prompts."""
        errors = solution.errors
        before, after = ((), ()) if errors is None else map(tuple, errors[:, :concepts].tolist())
        rank, weighting = solution.change.rank, solution.weighting[:concepts]
        return cls(rank, weighting, before, after, solution.truncated, repair)


@dataclass
class MergeReport:
    """Filled in while a merge is prepared and runs. ``sites`` are in execution order.
    ``convergence`` is the largest relative change of a site in each Jacobi iteration after the
    first; ``converged`` says whether it became small enough (None: no iterations). ``settings`` and
    ``calibration`` are as requested. ``notes`` list, by concept, what was left out or extracted
    when reading its file, and shared names. ``rows`` is their number in the largest stage, ``plan``
    shows how each stage stayed within its memory, ``short`` the lines with rows left out.
    ``preserved`` are the concepts without a LoRA, on which the base should not change. ``lacks``
    lists the parts of the LoRAs that are not in the merge. ``kept`` is what held-out rows keep of
    every LoRA, by how the merge is loaded, see :func:`.held_out.kept`. ``outlook`` is what was
    expected before anything was denoised (:func:`.planner.outlook_of`). ``partial`` says how many
    steps were taken, if not all."""

    method: str
    concepts: Sequence[str]
    sites: dict[str, SiteReport] = field(default_factory=dict[str, SiteReport])
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])
    notes: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    rows: int = 0
    convergence: list[float] = field(default_factory=list[float])
    plan: list[str] = field(default_factory=list[str])
    short: list[str] = field(default_factory=list[str])
    preserved: Sequence[str] = ()
    lacks: Sequence[str] = ()
    kept: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    outlook: str = ""
    partial: str = ""

    def note(self, name: str, *notes: str) -> None:
        """Add ``notes`` on a concept or a step."""
        if notes:
            self.notes.setdefault(name, []).extend(notes)

    @property
    def loras(self) -> int:
        """The number of concepts with a LoRA."""
        return len(self.concepts) - len(self.preserved)

    @property
    def converged(self) -> bool | None:
        """True if the last Jacobi iteration moved no change by more than :data:`SETTLED`; None
        without iterations."""
        if not self.convergence:
            return None
        return self.convergence[-1] <= SETTLED

    @property
    def strengths(self) -> tuple[float, float] | None:
        """The lowest and the highest measured strength at which the merge holds; None if nothing
        was measured, or it keeps little at 1."""
        kept = self._kept()
        if not kept.get("1", 0.0) >= LITTLE:  # nor NaN
            return None
        enough = BRITTLE * kept["1"]
        fine = [float(u) for u, share in kept.items() if u[0].isdigit() and share >= enough]
        return min(fine), max(fine)

    def _kept(self) -> dict[str, float]:
        """Use → what is kept, the mean over the LoRAs."""
        return {use: fmean(shares) for use, shares in self.kept.items()}

    def residuals(self) -> list[tuple[float, float]]:
        """(before, after) for every concept: root mean square over the sites."""
        sites = [site for site in self.sites.values() if site.after]

        def mean(errors: Sequence[float]) -> float:
            return math.hypot(*errors) / math.sqrt(len(errors)) if errors else math.nan

        return [
            (mean([site.before[i] for site in sites]), mean([site.after[i] for site in sites]))
            for i in range(len(self.concepts))
        ]

    def verdict(self) -> str:
        """What is wrong with the merge, a sentence each; otherwise, that it is closer to what each
        LoRA does than the mean of the LoRAs is, and to which least.

        Only pictures show how much likeness is kept (docs/decisions.md).
        """
        pairs = zip(self.concepts, self.residuals(), strict=True)
        own = [(name, *errors) for name, errors in pairs if name not in self.preserved]
        left = [(after / before, name) for name, before, after in own if before > 0]
        samples = self.calibration.get("samples", FEW)
        wrong: list[str] = []
        if self.lacks:
            wrong.append(f"Incomplete: the merge lacks {' and '.join(self.lacks)}.")
        if self.converged is False:
            wrong.append(
                f"Not converged: after {len(self.convergence) + 1} iterations the largest change "
                f"of a site was still {self.convergence[-1]:.2g} of its size. Use schedule=sweep, "
                "which needs no iterations, or allow more of them."
            )
        if self.loras > 1 and samples < FEW:
            wrong.append(
                f"Too few prompts: {samples} per LoRA; with other prompts the merge does less of "
                f"what the LoRAs do. Give at least {FEW} (samples)."
            )
        kept = self._kept()
        if broken := [use for use, share in kept.items() if math.isnan(share)]:
            wrong.append(
                f"Broken {' and '.join(map(_loaded, broken))}: the model's outputs are not "
                "numbers. A float16 base may overflow; use option base_dtype bfloat16, or a lower "
                "strength."
            )
        elif kept and kept["1"] < LITTLE:
            wrong.append(
                f"Weak: on new prompts little is left of the LoRAs{self._least()}. "
                f"{self._advice()}."
            )
        elif broken := [use for use, share in kept.items() if share < BRITTLE * kept["1"]]:
            uses = " and ".join(map(_loaded, broken))
            wrong.append(
                f"Brittle {uses}. The method iteris with its default bound and conditions is made "
                "for that."
            )
        if self.loras > 1 and (far := [name for share, name in left if share > 1]):
            wrong.append(
                f"No closer to {', '.join(far)} than the mean of the LoRAs. {self._advice()}, and "
                "check images."
            )
        if wrong or not own:
            return " ".join(wrong)
        if not left and not kept:
            return f"Not measured by {self.method}; check images."
        if self.loras == 1:
            return f"{own[0][0]} is the only LoRA that is merged."
        if kept:
            return self._shares()
        return (
            "Closer to what every LoRA does than the mean of the LoRAs is; least so for "
            f"{max(left)[1]}."
        )

    @property
    def grade(self) -> str:
        """The verdict in a word: strong, fair or weak; empty if nothing was measured."""
        kept = self._kept()
        if not self.loras or "1" not in kept:
            return ""
        if not kept["1"] >= LITTLE:  # nor if it is no number
            return "weak"
        whole = not self.lacks and all(share >= LITTLE for share in self.kept["1"])
        lasts = all(share >= BRITTLE * kept["1"] for share in kept.values())
        return "strong" if kept["1"] >= STRONG and whole and lasts else "fair"

    def headline(self) -> str:
        """The verdict as a line that begins with its :attr:`grade`, for those who read no more."""
        verdict = self.verdict()
        if not self.grade:
            return verdict
        share = f"{self._kept()['1']:.2f} of what each LoRA does is kept on new prompts"
        told = f"{self.grade.capitalize()}: {share}{self._least()}."
        return told if verdict == self._shares() else f"{told} {verdict.removeprefix('Weak: ')}"

    def _shares(self) -> str:
        shares = sorted(self._kept().items(), key=lambda item: item[0] != "1")
        listed = ", ".join(f"{share:.2f} {_loaded(use)}" for use, share in shares)
        ends = "(1: each LoRA alone, 0: the base)"
        return f"Kept on held-out rows {ends}: {listed}{self._least()}."

    def _least(self) -> str:
        names = [name for name in self.concepts if name not in self.preserved]
        return f", least of {min(zip(self.kept['1'], names, strict=True))[1]}" * (len(names) > 1)

    def _advice(self) -> str:
        lost = [site.truncated for site in self.sites.values() if site.after]
        if sum(lost) > 0.15 * len(lost):
            return "Raise rank"
        if (self.settings.get("ridge") or 0) > 1e-3:
            return "Lower ridge, or leave it to the merge"
        return "Use more samples, fewer LoRAs or more weight"

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN or infinity; None stands for anything not measured."""
        errors = zip(self.concepts, self.residuals(), strict=True)
        data = {
            **asdict(self),
            "verdict": self.verdict(),
            "converged": self.converged,
            "residuals": {name: {"before": b, "after": a} for name, (b, a) in errors},
        }
        return json.loads(json.dumps(data), parse_constant=lambda _: None)

    def summary(self) -> str:
        """A few readable lines."""
        ranks = sorted({site.rank for site in self.sites.values()})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        repairs = sum(site.repair for site in self.sites.values())
        more = f" and {repairs} that repair drift" if repairs else ""
        rows = f", {self.rows} rows" if self.rows else ""
        lines = [
            f"Merged {self.loras} concept{'s' * (self.loras != 1)} with {self.method}: "
            f"{len(self.sites) - repairs} sites{more}, rank {span}, {self.seconds:.1f} s{rows}."
        ]
        steps = self.notes.get("steps", [])
        if steps and not self.settings.get("steps"):
            lines.append(f"  Without steps, so less of each LoRA is kept: {steps[-1]}")
        lines += [
            f"  Not enough memory for {line}; allow more, or lower samples, timesteps or the size"
            for line in self.short
        ]
        if verdict := self.verdict():
            lines.append(f"  {verdict}")
        if self.kept and (shares := self._shares()) != verdict:
            lines.append(f"  {shares}")
        if self.converged:
            lines.append(
                f"  Converged after {len(self.convergence) + 1} iterations: the last one changed "
                f"no site by more than {self.convergence[-1]:.2g} of its size."
            )
        for name, notes in self.notes.items():
            lines += [f"  {name}: {note}" for note in notes]
        return "\n".join(lines)


def _loaded(use: str) -> str:
    return f"at strength {use}" if use[0].isdigit() else use
