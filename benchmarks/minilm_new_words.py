"""Prompts that no calibration saw, where words share features: the world of `minilm/`.

    PYTHONPATH=. python benchmarks/minilm_new_words.py sks,zwx [METHOD '{"setting": value}']…

Fields of the calibration count as settings, such as "contexts" and "generic". The script draws each
concept by calibration prompts (seen) and by prompts without any word of a template: in words that
the generic captions have (contexts), and in words that no row has (new). It adds a line of JSON for
each row to ``results/minilm_new_words.jsonl``, and skips rows that are there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import minilm
import rivals  # noqa: F401 (registers them)
import torch
from minilm.prompts import Kind, prompts, templates
from outputs import result_file
from protocol.drawing import draw
from protocol.world import Wanted

import toybox
from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost

KINDS: dict[Kind, int] = {"seen": 6, "contexts": 10, "new": 14}
"""Prompts of each concept."""

OFF = {"contexts": 0, "generic": 0}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("base", {}),
    ("alone", {}),
    ("iteris", {}),
    ("iteris", {"ridge": 1e-4}),
    ("iteris", OFF),
    ("iteris", {"ridge": 1e-4, **OFF}),
    ("regmean++", {}),
    ("regmean++", OFF),
    ("ssr", {}),
    ("ssr", OFF),
    ("average", {}),
    ("sum", {}),
]

Figures = dict[str, tuple[float, float]]
"""kind of prompts → attributes right, backgrounds right"""


class World:
    """Four concepts, one at a time in a picture."""

    def __init__(self) -> None:
        self.pipeline = minilm.load_pipeline()
        self.host = DiffusersHost(self.pipeline)
        self._judge = toybox.load_judge()
        self._concepts = minilm.concepts()
        self._loras = {n: self.host.read_lora(of.lora) for n, of in self._concepts.items()}

    def concepts(self, names: Sequence[str]) -> list[Concept]:
        return [
            Concept(self._loras[n], trigger=n, class_word=self._concepts[n].class_word)
            for n in names
        ]

    def right(self, lora: Lora | None, names: Sequence[str], kind: Kind, count: int) -> Any:
        """The shares of attributes and of backgrounds that are as they should be in ``count``
        pictures of each of ``names`` by prompts of a kind."""
        wanted = [
            Wanted((name,), prompt.text, 1, prompt.background)
            for name in names
            for prompt in prompts(self._concepts[name], kind, count)
        ]
        said = minilm.world()["sampling"]
        sampling = {"num_inference_steps": said["steps"], "guidance_scale": said["guidance"]}
        with torch.autocast("cpu", torch.bfloat16):
            images = draw(self.pipeline, self.host, lora, wanted, **sampling)
        read = list(zip(self._judge.read(images), wanted, strict=True))
        things = [self._concepts[one.shown[0]].thing for one in wanted]
        return (
            fmean(sum(a.matches(t)) / 4 for (a, _), t in zip(read, things, strict=True)),
            fmean(a.background == one.scene for a, one in read),
        )

    def drawn(self, lora: Lora | None, names: Sequence[str]) -> Figures:
        return {kind: self.right(lora, names, kind, count) for kind, count in KINDS.items()}

    def alone(self, names: Sequence[str]) -> Figures:
        """Each LoRA by itself."""
        each = [self.drawn(self._loras[name], [name]) for name in names]
        return {
            kind: (fmean(e[kind][0] for e in each), fmean(e[kind][1] for e in each))
            for kind in KINDS
        }

    def merged(self, names: Sequence[str], method: str, settings: dict[str, Any]) -> Lora:
        host = None if method in ("average", "sum") else self.host
        fields = Calibration.__dataclass_fields__
        own = {name: value for name, value in settings.items() if name in fields}
        settings = {name: value for name, value in settings.items() if name not in own}
        calibration = {"templates": templates(), "seed": 0, **own}
        concepts = self.concepts(names)
        return merge_loras(host, concepts, method, settings=settings, calibration=calibration).lora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names")
    parser.add_argument("rows", nargs="*")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin nothing after these"
    )
    asked = parser.parse_args()
    until = time.time() + asked.seconds
    names = asked.names.split(",")
    given = zip(asked.rows[::2], map(json.loads, asked.rows[1::2]), strict=True)
    world = World()
    file = result_file("minilm_new_words.jsonl")
    known = [json.loads(line) for line in file.open()] if file.exists() else []
    for method, settings in list(given) or ROWS:
        label = " ".join([method, *(f"{k} {v}" for k, v in settings.items())])
        if any(entry["names"] == names and entry["label"] == label for entry in known):
            continue
        if time.time() > until:
            break
        began = time.time()
        if method == "alone":
            found = world.alone(names)
        else:
            lora = None if method == "base" else world.merged(names, method, settings)
            found = world.drawn(lora, names)
        entry = {"names": names, "label": label, **found, "seconds": time.time() - began}
        known.append(entry)
        with file.open("a") as lines:
            lines.write(json.dumps(entry) + "\n")
        print(json.dumps(entry), flush=True)


if __name__ == "__main__":
    main()
