"""Estimates a merge's remaining seconds, from site weights by shape and measured rates.

A row's forward is timed once, and its seconds are divided among the sites by their products.
Moments and solves are priced by their products on this machine. :class:`..progress.Forecast`
corrects both from measurements during the merge.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from ..calibration_prompts import context_shares, distinct_prompts, samples_of
from ..concepts import Calibration, Concept
from ..hosts.protocol import DENOISING, Stage
from ..linalg.precision import full_precision
from ..lora import SiteChanges
from ..progress import Forecast, OnProgress
from .batches import SWEEP, ExecutionConfig, Schedule, limit_of

FORWARDS, SITES = "forwards", "sites"
_STAGES = "stages"
_AGAIN = "again"
_FACTORS = 4.0  # cost of factors and eigenvectors, relative to the same number of products


@dataclass(frozen=True)
class Reached:
    """A site in a forward: (out, in), and ``tokens`` per row. If it ``shares`` its inputs, an
    earlier site makes their moments."""

    shape: tuple[int, int]
    tokens: int
    shares: bool = False

    @property
    def products(self) -> int:
        return self.tokens * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Seen:
    """A stage that has run: the sites that a forward reached, in order, and ``a_row``, its seconds
    per row (0: unknown)."""

    stage: Stage
    sites: Mapping[str, Reached]
    a_row: float = 0.0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Passes:
    """The passes ahead, in which the sites of ``changes`` are solved: during a sweep, otherwise
    after each pass."""

    changes: Mapping[str, SiteChanges]
    batching: ExecutionConfig
    schedule: Schedule = SWEEP


class Eta:
    """The remaining work of one merge: ``rounds`` of passes, each over all stages; :meth:`expect`
    starts one."""

    def __init__(
        self,
        on_progress: OnProgress | None = None,
        clock: Callable[[], float] = time.perf_counter,
        *,
        rounds: int = 1,
    ) -> None:
        self.forecast, self.rounds = Forecast(on_progress, clock), rounds
        self._seen: dict[str, Seen] = {}
        self._later: dict[str, float] = {}
        self._passes: Passes | None = None

    def saw(self, seen: Seen, concepts: Sequence[Concept], calibration: Calibration) -> None:
        """Record a short pass with one sample of each of the ``concepts`` at every step, which
        predicts roughly how many rows the stage will have."""
        rows = Counter(seen.stage.concept_ids)
        if seen.stage.spatial:
            part = calibration.rows_each / calibration.denoising_steps
            times = _times_as_many(concepts, calibration)
            each = [round(rows[owner] * many * part) for owner, many in enumerate(times)]
        else:
            shares = context_shares(concepts, calibration)
            each = [_texts(*of, calibration) for of in zip(concepts, shares, strict=True)]
        owners = [owner for owner, count in enumerate(each) for _ in range(count)]
        stage = replace(seen.stage, concept_ids=owners, samples=None)
        self._seen.setdefault(stage.name, replace(seen, stage=stage))

    def later(self, what: str, forwards: float) -> None:
        """Behind the sites comes ``what``: so many ``forwards`` of a row."""
        self._later[what] = forwards

    def expect(self, passes: Passes, denoised: int) -> None:
        """Expect the samples to be made by that many one-row forwards."""
        self._passes, self.rounds = passes, max(self.rounds - 1, 0)
        if not self._seen:
            self.forecast.expect(_STAGES, {"": 1.0}, known=False)
        pictures = [seen.a_row for seen in self._seen.values() if seen.stage.spatial]
        if pictures and denoised:
            seconds = denoised * sum(pictures) / len(pictures)
            self.forecast.expect(DENOISING, {"": seconds}, FORWARDS)
        for seen in self._seen.values():
            self._expect(seen)
        self._expect_later()

    def measured(self, seen: Seen, slower: float = 1.0) -> None:
        """Record a stage's measured row, and that its strategy makes forwards that many times
        ``slower``; a short pass, if there was one, knows more sites."""
        known = self._seen.get(seen.stage.name, seen)
        a_row = min(known.a_row or seen.a_row, seen.a_row)
        sites = {**known.sites, **seen.sites}  # in the order of the first one
        self._seen[seen.stage.name] = replace(seen, sites=sites, a_row=a_row)
        self.begin(seen.stage, slower)

    def begin(self, stage: Stage, slower: float) -> None:
        """Record that a stage begins, or begins again."""
        if self._passes is not None:
            self.forecast.drop(_STAGES)
            seen = self._seen.get(stage.name) or Seen(stage, {})
            self._seen[stage.name] = seen = replace(seen, stage=stage)
            self._expect(seen, slower)
            self._expect_later()
        self.forecast.mark()

    def done(self, kind: str, stage: Stage, part: Hashable, share: float = 1.0) -> None:
        """Record that this ``share`` of a part's remaining work was done since the last call."""
        self.forecast.spent((kind, stage.name), part, share)

    def _expect(self, seen: Seen, slower: float = 1.0) -> None:
        """A part is (pass, site), or (pass, "") for forwards in which no site waits."""
        passes, stage = self._passes, seen.stage
        assert passes is not None
        rows = len(stage.concept_ids)
        limit = limit_of(stage, passes.batching)
        forwards: dict[Hashable, float] = {}
        solves: dict[Hashable, float] = {}
        sites = seen.sites or {s: Reached(passes.changes[s].shape, 1) for s in stage.sites}
        whole = sum(reached.products for reached in sites.values()) or 1
        a_forward = rows * passes.schedule.copies * (seen.a_row * slower or 1.0)
        for turn in range(passes.schedule.passes):
            way = 0.0
            for site, reached in sites.items():
                way += a_forward * reached.products / whole
                if site not in passes.changes:
                    continue
                width = reached.shape[1]
                tokens = reached.tokens if limit is None else min(reached.tokens, limit(width))
                moments, solve = _work(reached, rows * tokens, passes.changes[site].rank)
                second = _product_seconds(seen.device.type)
                if passes.schedule.sweep:
                    forwards[turn, site], solves[turn, site] = way, (moments + solve) * second
                else:  # the first of several passes runs only reference rows
                    way *= 0.5 if passes.schedule.passes > 1 and turn == 0 else 1.0
                    forwards[turn, ""] = forwards.get((turn, ""), 0.0) + way + moments * second
                    solves[turn, site] = solve * second
                way = 0.0
        for kind, parts in ((FORWARDS, forwards), (SITES, solves)):
            self.forecast.drop((kind, stage.name))
            known = bool(seen.a_row) or kind == SITES
            self.forecast.expect((kind, stage.name), parts, kind, known=known)
            rounds = self.rounds if seen.a_row else 0
            again = rounds * sum(parts.values())
            self.forecast.expect((_AGAIN, kind, stage.name), {"": again}, kind)

    def _expect_later(self) -> None:
        """Based on a row of the last stage."""
        if self._later and self._seen:
            seen = list(self._seen.values())[-1]
            for what, forwards in self._later.items():
                seconds = forwards * seen.a_row
                self.forecast.expect(what, {"": seconds or 1.0}, FORWARDS, known=bool(seconds))


def _work(reached: Reached, tokens: int, rank: int) -> tuple[float, float]:
    """The products for a site's moments, and the equivalent products for its solve: X̃ᵀX̃ or, with
    fewer tokens than inputs, X̃X̃ᵀ; its factor; and the target in some output directions."""
    out, width = reached.shape
    few, rows = min(tokens, width), min(out, int(1.25 * rank) + 32)
    own = 0 if reached.shares else 1
    moments = 2 * tokens * width * (own * few / 2 + rows)
    return moments, _FACTORS * few * width * (own * few / 3 + rows)


@cache
def _product_seconds(device: str) -> float:
    """Seconds per float32 multiply-add: the shortest of three runs."""
    size = 256 if device == "cpu" else 1024
    matrix = torch.ones(size, size, device=device)
    took: list[float] = []
    with full_precision(torch.device(device)):
        for _ in range(3):
            started = time.perf_counter()
            float((matrix @ matrix)[0, 0])  # waits for the device
            took.append(time.perf_counter() - started)
    return min(took) / (2 * size**3)


def _times_as_many(concepts: Sequence[Concept], calibration: Calibration) -> list[float]:
    """For each concept, its samples per sample of a short pass; without a LoRA it has as many rows
    as the others' most samples give it."""
    every, short = (
        [samples_of(one, given) if one.lora is not None else 0 for one in concepts]
        for given in (calibration, replace(calibration, samples=1))
    )
    of_most = max(every) / max(short)
    return [many / one if one else of_most for many, one in zip(every, short, strict=True)]


def _texts(concept: Concept, contexts: float, calibration: Calibration) -> int:
    """Roughly the number of different prompts per concept, including the empty one."""
    pool = distinct_prompts(concept, calibration)
    if concept.lora is None:
        return pool
    of_rows = calibration.samples * calibration.rows_each * (1 - calibration.empty_share)
    plain = min(samples_of(concept, calibration), pool)
    return round(plain + contexts * of_rows) + (calibration.empty_share > 0)
