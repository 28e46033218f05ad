"""Runs the units of a plan on a world, each once, and keeps what came out line by line.

Each merge is calibrated on prompts without its world's evaluation words and drawn on prompts of
several kinds (:class:`~.world.World`). ``no trigger`` pictures are held against the base's own of
the same prompts and noise; ``spread`` is how far pictures of one prompt lie apart over seeds, as a
share of what each LoRA's own pictures do; ``quality`` has kernel distances, of the pictures with
new words to each LoRA's own and of those without a trigger to the base's.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from iteris_core import Calibration, Lora, write_lora

from .held_out import held_out, merged
from .plan import BASE, SINGLE, Unit
from .world import Wanted, World

Entry = dict[str, Any]
"""``key``; for each kind of prompt ``[name, figures]`` of each picture, of ``spread`` of each
concept; of a merge ``seconds`` of this process's processor time, the largest ``rank`` and the
``bytes`` of its file."""


def stored(file: Path) -> dict[str, Entry]:
    """What a file has, by the keys of units."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {entry["key"]: entry for entry in map(json.loads, lines)}


class Runs:
    """What was measured, by unit; also what ``others`` have. A run that was stopped goes on."""

    def __init__(self, world: World, cache: Path, *others: Path) -> None:
        self.world = world
        self.cache = cache
        self.known = {key: of for file in (*others, cache) for key, of in stored(file).items()}
        self._drawn: dict[str, tuple[Sequence[Wanted], Sequence[Image.Image]]] = {}
        self._vectors: dict[tuple[str, int, int], Tensor] = {}

    def run(self, units: Iterable[Unit], seconds: float = float("inf")) -> bool:
        """Measure what is not known, and begin nothing more after ``seconds``; whether all is
        known now."""
        until = time.monotonic() + seconds
        for unit in units:
            if unit.key in self.known:
                continue
            if time.monotonic() > until:
                return False
            self.keep(unit, self.measure(unit))
        return True

    def keep(self, unit: Unit, entry: Entry) -> None:
        self.known[unit.key] = entry = {"key": unit.key, **entry}
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with self.cache.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        print(unit.key, f"{entry.get('seconds', 0.0):.1f} s", file=sys.stderr, flush=True)

    def measure(self, unit: Unit) -> Entry:
        """Merge, draw and judge."""
        lora, entry = self._merged(unit)
        for kind in self.world.kinds:
            entry[kind] = self._quality(unit) if kind == "quality" else self._of(lora, kind, unit)
        return entry

    def calibration(self, unit: Unit) -> Calibration:
        return Calibration.from_mapping(
            {**self.world.half, "seed": unit.replicate, **unit.calibration}
        )

    def _merged(self, unit: Unit) -> tuple[Lora | None, Entry]:
        if unit.method == BASE:
            return None, {}
        concepts = self.world.concepts(unit.names, unit.trained)
        if unit.method == SINGLE:
            (concept,) = concepts
            return concept.lora, {}
        began = time.process_time()
        if "/" in unit.method:
            merge = loaded(Path(unit.method))
            with held_out(self.world.host, self.world.words):
                lora = merge(self.world.host, concepts, self.calibration(unit), **unit.settings)
        else:
            fields = {"seed": unit.replicate, **unit.calibration}
            lora = merged(
                self.world, concepts, unit.method, settings=unit.settings, calibration=fields
            )
        seconds = time.process_time() - began
        return lora, {"seconds": seconds, "rank": max(lora.ranks), "bytes": _bytes(lora)}

    def _of(self, lora: Lora | None, kind: str, unit: Unit) -> list[Any]:
        wanted = self.world.prompted(kind, unit.names, unit.replicate + 1)
        plain = unit.method == BASE and kind == "no trigger"
        images = self._of_base(wanted) if plain else self.world.draw(lora, wanted)
        self._drawn[kind] = wanted, images
        return self._read(kind, images, wanted)

    def _quality(self, unit: Unit) -> list[Any]:
        """Of the pictures that were drawn last; of a LoRA alone against its own by other noise."""
        (wanted, images), (plain, unnamed) = self._drawn["new words"], self._drawn["no trigger"]
        vectors, found = self.world.embedded(images), list[Any]()
        for name in unit.names:
            mine = vectors[[w.shown[0] == name for w in wanted]]
            noise = unit.replicate + (2 if unit.method == SINGLE else 1)
            found.append([name, {"distance": distance(mine, self._own(name, unit.trained, noise))}])
        base = self.world.embedded(self._of_base(plain))
        return [*found, ["", {"base": distance(self.world.embedded(unnamed), base)}]]

    def _own(self, name: str, trained: int, seed: int) -> Tensor:
        """Vectors of the pictures that a LoRA alone draws of new words, drawn once."""
        key = name, trained, seed
        if key not in self._vectors:
            (concept,) = self.world.concepts((name,), trained)
            drawn = self.world.draw(concept.lora, self.world.prompted("new words", (name,), seed))
            self._vectors[key] = self.world.embedded(drawn)
        return self._vectors[key]

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


def loaded(folder: Path) -> Callable[..., Lora]:
    """The function of a method's folder."""
    file = folder / "method.py"
    if not file.is_file():
        raise SystemExit(
            f"{file} is missing: a method is a folder with method.py (open/README.md)."
        )
    merge = runpy.run_path(str(file)).get("merge")
    if not callable(merge):
        raise SystemExit(f"{file} has no function merge(host, concepts, calibration, …).")
    return merge


def distance(mine: Tensor, other: Tensor) -> float:
    """The kernel distance (KID; Bińkowski et al., ICLR 2018) of two sets of unit vectors, (n, d)
    each: the unbiased squared MMD by the kernel (x·y + 1)³. Vectors of one place in both may be of
    one prompt and noise, so that pairs of a place with itself count nowhere."""
    mine, other = mine.double(), other.double()
    within, beyond = (
        sum((of - of.diagonal().diag()).sum() for of in ((x @ y.T + 1) ** 3 for x, y in pairs))
        for pairs in (((mine, mine), (other, other)), ((mine, other), (other, mine)))
    )
    return float(within - beyond) / (len(mine) * (len(mine) - 1))


def pixels(image: Image.Image, other: Image.Image) -> float:
    """The root of the mean squared difference of two pictures' values from 0 to 1."""
    one, two = (np.asarray(i.convert("RGB"), dtype=float) / 255 for i in (image, other))
    return float(np.sqrt(((one - two) ** 2).mean()))


def _bytes(lora: Lora) -> int:
    """The size of the file that a user would get."""
    with tempfile.TemporaryDirectory() as folder:
        return write_lora(lora, Path(folder) / "merged.safetensors").stat().st_size
