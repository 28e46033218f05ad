"""Runs the units of a plan on a world, each once, and keeps what came out line by line."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from klora import KLora, k_lora
from PIL import Image

from iteris_core import Calibration, Lora, merge_loras
from iteris_core.merge import MergeResult

from .plan import BASE, SINGLE, SWITCHED, Unit, collected, merged_by
from .world import Wanted, World

Entry = dict[str, Any]
"""``key`` and ``unit``; ``alone``: [name, {judge: likeness}, text]; ``together`` and ``styled``:
[names, [{judge: likeness} or None for each], text]; of a merge ``seconds`` of this process's
processor time, the largest ``rank`` and the ``bytes`` of its file."""


class Runs:
    """What was measured, by unit. A run that was stopped goes on."""

    def __init__(self, world: World, cache: Path) -> None:
        self.world = world
        self.cache = cache
        self.known: dict[str, Entry] = {}
        if cache.exists():
            entries = [json.loads(line) for line in cache.read_text().splitlines()]
            self.known = {entry["key"]: entry for entry in entries}

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
        if unit.method == SINGLE and unit.styled:
            return self._each_alone(unit)
        if unit.method == SWITCHED:
            return self._switched(unit)
        lora, entry = self._merged(unit)
        if unit.styled:
            wanted = self.world.styled(*unit.names, unit.replicate + 1)
            return entry | {"styled": self._styled(lora, wanted)}
        alone = [w for name in unit.names for w in self.world.alone(name, unit.replicate + 1)]
        entry["alone"] = self._alone(lora, alone)
        several = self.world.together(unit.names, unit.replicate + 1)
        if several:
            entry["together"] = self._together(lora, several)
        return entry

    def calibration(self, unit: Unit) -> Calibration:
        return Calibration.from_mapping(
            {**self.world.calibration, **collected(unit.regime), "seed": unit.replicate}
        )

    def _merged(self, unit: Unit) -> tuple[Lora | None, Entry]:
        if unit.method == BASE:
            return None, {}
        concepts = self.world.concepts(unit.names, unit.trained)
        if unit.method == SINGLE:
            (concept,) = concepts
            return concept.lora, {}
        began = time.process_time()
        result = merge_loras(
            self.world.host,
            concepts,
            merged_by(unit.method),
            settings=unit.settings,
            calibration=self.calibration(unit),
        )
        seconds = time.process_time() - began
        return result.lora, {
            "seconds": seconds,
            "rank": max(result.lora.ranks),
            "bytes": _bytes(result),
        }

    def _alone(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Any]:
        images = self.world.draw(lora, wanted)
        names = [w.shown[0] for w in wanted]
        judged = self.world.likeness(images, names)
        texts = self.world.text_alignment(images, wanted)
        return [
            [name, {judge: values[i] for judge, values in judged.items()}, text]
            for i, (name, text) in enumerate(zip(names, texts, strict=True))
        ]

    def _together(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Any]:
        images = self.world.draw(lora, wanted)
        texts = self.world.text_alignment(images, wanted)
        cut = self.world.crops(images, wanted)
        return [
            [w.shown, [self._one(crop, name) for crop, name in zip(crops, w.shown, strict=True)], t]
            for w, crops, t in zip(wanted, cut, texts, strict=True)
        ]

    def _styled(self, lora: Lora | None, wanted: Sequence[Wanted]) -> list[Any]:
        images = self.world.draw(lora, wanted)
        texts = self.world.text_alignment(images, wanted)
        return [
            [w.shown, [self._one(image, name) for name in w.shown], text]
            for w, image, text in zip(wanted, images, texts, strict=True)
        ]

    def _each_alone(self, unit: Unit) -> Entry:
        """Of a subject with a style each LoRA by itself: the subject's likeness with the subject's
        LoRA, the style's with the style's, as what a merge of both would have at best."""
        wanted = self.world.styled(*unit.names, unit.replicate + 1)
        parts = [
            self._styled(concept.lora, wanted)
            for concept in self.world.concepts(unit.names, unit.trained)
        ]
        return {
            "styled": [
                [shown, [of_subject[0], of_style[1]], text]
                for (shown, of_subject, text), (_, of_style, _) in zip(*parts, strict=True)
            ]
        }

    def _switched(self, unit: Unit) -> Entry:
        """Of a subject with a style by K-LoRA: no merge, and both files."""
        first, second = (c.lora for c in self.world.concepts(unit.names, unit.trained))
        host = self.world.host
        pair = KLora(first, second)
        wanted = self.world.styled(*unit.names, unit.replicate + 1)
        with k_lora(pair, host.sites(), host.denoiser, self.world.calls):
            return {"styled": self._styled(None, wanted)}

    def _one(self, image: Image.Image | None, name: str) -> dict[str, float] | None:
        if image is None:
            return None
        return {judge: values[0] for judge, values in self.world.likeness([image], [name]).items()}


def _bytes(result: MergeResult) -> int:
    """The size of the file that a user would get."""
    with tempfile.TemporaryDirectory() as folder:
        return result.save(Path(folder) / "merged.safetensors").stat().st_size
