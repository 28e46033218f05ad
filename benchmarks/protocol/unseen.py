"""Merges on prompts that no calibration row had.

Each merge is calibrated on half of its world's templates and drawn on prompts of several kinds
(:class:`~.world.UnseenWorld`). ``no trigger`` pictures are held against the base's own of the same
prompts and noise; ``spread`` is how far pictures of one prompt lie apart over seeds, as a share of
what each LoRA's own pictures do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

from iteris_core import Calibration, Lora

from .plan import BASE, OWN, SINGLE, Settings, Unit, sets_of
from .runs import Entry, Runs
from .table import Figures, Place, stat
from .world import UnseenWorld, Wanted

Row = dict[str, dict[str, float]]
"""kind of prompt → figure → mean over the pictures of a set"""

KEPT = ("likeness", "judge")
"""Figures that also stand as a share of what each LoRA alone has above the base."""

TOLD_APART = 0.05
"""By how much the LoRAs alone must be above the base for a share of it to mean something."""

LESS = ("pixels",)
"""Figures of which less is better."""


@dataclass(frozen=True)
class Trial(Unit):
    """A unit with fields of the calibration beside the world's half of its templates."""

    calibration: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Variant:
    """A row of the table: a method with settings and fields of the calibration."""

    label: str
    method: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    searched: bool = False

    @classmethod
    def parsed(cls, label: str) -> Variant:
        """From ``METHOD[@searched][:FIELD=VALUE]…``, each field the method's or the calibration's;
        ``@searched`` starts from the settings that a search found for the number of LoRAs."""
        head, *fields = label.split(":")
        method, _, which = head.partition("@")
        if which not in ("", "searched"):
            raise ValueError(f"{label!r}: only @searched may follow a method, not @{which}.")
        pairs = {name: _value(value) for name, _, value in (f.partition("=") for f in fields)}
        of_calibration = set(Calibration.__dataclass_fields__)
        return cls(
            label,
            method,
            {name: value for name, value in pairs.items() if name not in of_calibration},
            {name: value for name, value in pairs.items() if name in of_calibration},
            which == "searched",
        )

    def trial(
        self, names: tuple[str, ...], replicate: int, trained: int, searched: Settings
    ) -> Trial:
        found = searched(self.method, len(names), "default") if self.searched else {}
        settings = {**OWN.get(self.method, {}), **found, **self.settings}
        return Trial(
            self.method,
            names,
            replicate=replicate,
            settings=settings,
            trained=trained,
            calibration=self.calibration,
        )


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Plan:
    """The merges of a table: ``per_size`` sets of each size at most in each replicate."""

    world: UnseenWorld
    variants: Sequence[Variant]
    sizes: Sequence[int]
    replicates: int
    searched: Settings
    per_size: int | None = None

    def references(self) -> Iterator[Trial]:
        """Of all sets what each LoRA alone and the base have, each once."""
        known: dict[str, Trial] = {}
        for replicate, size in product(range(self.replicates), self.sizes):
            for names, method in product(self.sets(size, replicate), (SINGLE, BASE)):
                known |= {one.key: one for one in self.references_of(method, names, replicate)}
        yield from known.values()

    def references_of(self, method: str, names: Sequence[str], replicate: int) -> list[Trial]:
        """Those of a set, by concept."""
        trained = 0 if method == BASE else replicate % self.world.trained
        return [Trial(method, (name,), replicate=replicate, trained=trained) for name in names]

    def merges(self) -> Iterator[tuple[Variant, Trial]]:
        """Set by set, so that methods can be paired on what a run that was stopped has."""
        for replicate, size in product(range(self.replicates), self.sizes):
            trained = replicate % self.world.trained
            for names, variant in product(self.sets(size, replicate), self.variants):
                yield variant, variant.trial(names, replicate, trained, self.searched)

    def sets(self, size: int, replicate: int) -> list[tuple[str, ...]]:
        return sets_of(self.world.subjects, size, replicate)[: self.per_size]


class UnseenRuns(Runs):
    """Entries hold, for each kind of prompt, ``[name, figures]`` of each picture; of ``spread``,
    of each concept."""

    world: UnseenWorld

    def calibration(self, unit: Unit) -> Calibration:
        own = unit.calibration if isinstance(unit, Trial) else {}
        return Calibration.from_mapping({**self.world.half, "seed": unit.replicate, **own})

    def measure(self, unit: Unit) -> Entry:
        lora, entry = self._merged(unit)
        return entry | {kind: self._of(lora, kind, unit) for kind in self.world.kinds}

    def _of(self, lora: Lora | None, kind: str, unit: Unit) -> list[Any]:
        wanted = self.world.prompted(kind, unit.names, unit.replicate + 1)
        plain = lora is None and kind == "no trigger"
        images = self._of_base(wanted) if plain else self.world.draw(lora, wanted)
        return self._read(kind, images, wanted)

    def _read(
        self, kind: str, images: Sequence[Image.Image], wanted: Sequence[Wanted]
    ) -> list[Any]:
        if kind == "spread":
            names = [w.shown[0] for w in wanted]
            return [[one, self._spread(images, names, one)] for one in dict.fromkeys(names)]
        read = self.world.read(images, wanted)
        if kind == "no trigger":
            base = self._of_base(wanted)
            cosines = (self.world.embedded(images) * self.world.embedded(base)).sum(1).tolist()
            read = [
                {**figures, "likeness": cosine, "pixels": pixels(image, other)}
                for figures, cosine, image, other in zip(read, cosines, images, base, strict=True)
            ]
        return [
            [" ".join(w.shown), {name: round(value, 4) for name, value in figures.items()}]
            for w, figures in zip(wanted, read, strict=True)
        ]

    def _spread(
        self, images: Sequence[Image.Image], names: Sequence[str], one: str
    ) -> dict[str, float]:
        """How far the pictures of ``one`` lie apart on average, by the world's CLIP (one less the
        cosine) and by pixels."""
        own = [image for image, name in zip(images, names, strict=True) if name == one]
        vectors = self.world.embedded(own)
        pairs = list(combinations(range(len(own)), 2))
        return {
            "share": fmean(float(1 - vectors[i] @ vectors[j]) for i, j in pairs),
            "share of pixels": fmean(pixels(own[i], own[j]) for i, j in pairs),
        }

    def _of_base(self, wanted: Sequence[Wanted]) -> Sequence[Image.Image]:
        """The base's own pictures, drawn once."""
        key = tuple((w.prompt, w.seed) for w in wanted)
        if self._base_key != key:
            self._base_key, self._base_images = key, self.world.draw(None, wanted)
        return self._base_images

    _base_key: tuple[tuple[str, int], ...] = ()
    _base_images: Sequence[Image.Image] = ()


def pixels(image: Image.Image, other: Image.Image) -> float:
    """The root of the mean squared difference of two pictures' values from 0 to 1."""
    one, two = (np.asarray(i.convert("RGB"), dtype=float) / 255 for i in (image, other))
    return float(np.sqrt(((one - two) ** 2).mean()))


def joined(entries: Iterable[Entry], kinds: Sequence[str]) -> Entry:
    """Entries of single concepts as that of a set."""
    every = list(entries)
    return {kind: [row for entry in every for row in entry[kind]] for kind in kinds}


def row(entry: Entry, alone: Entry, base: Entry, kinds: Sequence[str]) -> Row:
    """Means over pictures, what a merge keeps of ``alone`` above ``base`` (``… kept``), and its
    spread as a share of that of each LoRA alone."""
    found: Row = {}
    for kind in kinds:
        found[kind] = means = _means(entry[kind])
        if kind == "spread":
            own = _means(alone[kind])
            found[kind] = {name: value / own[name] for name, value in means.items()}
            continue
        for name in KEPT:
            if kind == "no trigger" or name not in means:
                continue
            low, high = (_means(other[kind])[name] for other in (base, alone))
            if high - low > TOLD_APART:
                means[f"{name} kept"] = (means[name] - low) / (high - low)
    return found


def _means(rows: Sequence[Any]) -> dict[str, float]:
    return {name: fmean(figures[name] for _, figures in rows) for name in rows[0][1]}


def against(ours: Mapping[Place, float], theirs: Mapping[Place, float], *, less: bool) -> Figures:
    """``ours`` less ``theirs`` over the sets that both have, with the interval and its verdict;
    with ``less`` the smaller one is the better."""
    found = stat([ours[place] - theirs[place] for place in ours if place in theirs])
    return found | {"verdict": verdict(found["interval"], less=less)}


def verdict(interval: Sequence[float] | None, *, less: bool = False) -> str:
    """``first`` or ``behind`` where a 95 % interval of differences leaves out 0, else ``level``;
    ``unknown`` without one, of a single set."""
    if interval is None:
        return "unknown"
    low, high = interval
    if low <= 0 <= high:
        return "level"
    return "first" if (low > 0) != less else "behind"


Rows = dict[str, dict[Place, Row]]
"""label → set → figures"""


def rows_of_size(plan: Plan, size: int, alone: UnseenRuns, merged: UnseenRuns) -> Rows:
    """Of all sets of ``size`` that are measured, the LoRAs alone and the base among them."""
    rows: Rows = {}
    kinds = plan.world.kinds
    for variant, trial in plan.merges():
        if len(trial.names) != size:
            continue
        of = {
            method: [one.key for one in plan.references_of(method, trial.names, trial.replicate)]
            for method in (SINGLE, BASE)
        }
        if not all(key in alone.known for keys in of.values() for key in keys):
            continue
        own, base = (
            joined((alone.known[key] for key in of[method]), kinds) for method in (SINGLE, BASE)
        )
        place = trial.replicate, trial.names
        for method, entry in ((SINGLE, own), (BASE, base)):
            rows.setdefault(method, {})[place] = row(entry, own, base, kinds)
        if trial.key in merged.known:
            entry = merged.known[trial.key]
            rows.setdefault(variant.label, {})[place] = row(entry, own, base, kinds)
    return rows


def figures(rows: Rows, ours: str) -> Figures:
    """``rows``: label → kind → figure → its mean with an interval over sets; ``against``: the same
    of ``ours`` less each other method on the sets of both, with a verdict."""
    means: Figures = {}
    paired: Figures = {}
    mine = rows.get(ours, {})
    for label, of in rows.items():
        for kind, name in _columns(of):
            values = _column(of, kind, name)
            means.setdefault(label, {}).setdefault(kind, {})[name] = stat(list(values.values()))
            both = _column(mine, kind, name)
            if label != ours and kind != "spread" and both.keys() & values.keys():
                difference = against(both, values, less=name in LESS)
                paired.setdefault(label, {}).setdefault(kind, {})[name] = difference
    return {"rows": means, "against": paired}


def _columns(of: Mapping[Place, Row]) -> list[tuple[str, str]]:
    """Kind and figure of all that any set has."""
    return list(dict.fromkeys((k, name) for one in of.values() for k in one for name in one[k]))


def _column(of: Mapping[Place, Row], kind: str, name: str) -> dict[Place, float]:
    return {place: one[kind][name] for place, one in of.items() if name in one.get(kind, {})}
