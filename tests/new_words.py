"""A small world of the protocol, whose pictures are shades of grey."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from protocol.world import KINDS, Wanted
from tiny import random_lora

from iteris_core import Concept


class FakeWorld:
    """Concepts whose likeness is a number of the LoRA."""

    subjects, sizes, kinds = ("s0", "s1", "s2", "s3"), (2, 4), KINDS
    trained, calls = 1, 4
    roots = ()

    def __init__(self, host):
        self.host = host
        self.calibration = {"templates": ("a {} in a picture",)}
        self.half = {"templates": ("a {}",), "samples": 2, "timesteps": 1, "denoising_steps": 2}
        self.loras = {name: random_lora(host, seed) for seed, name in enumerate(self.subjects)}
        self.drawn: list[str] = []

    def concepts(self, names, trained):
        return [Concept(self.loras[name], trigger=name, class_word="cat") for name in names]

    def prompted(self, kind, names, seed):
        if kind == "no trigger":
            return [Wanted((), "a dog", seed, "white")]
        seeds = range(3 if kind == "spread" else 1)
        return [Wanted((n,), f"a {n} cat, {kind}", s, "white") for n in names for s in seeds]

    def draw(self, lora, wanted):
        own = any(lora is known for known in self.loras.values())
        grey = 0 if lora is None else 200 if own else 100
        self.drawn += [w.prompt for w in wanted]
        return [Image.new("RGB", (4, 4), (grey + 10 * w.seed,) * 3) for w in wanted]

    def read(self, images, wanted):
        values = [image.getpixel((0, 0))[0] / 250 for image in images]
        if not wanted[0].shown:
            return [{"scene": 1.0} for _ in values]
        return [{"likeness": v, "judge": v, "text": 0.7, "scene": 1.0} for v in values]

    def embedded(self, images):
        angles = [image.getpixel((0, 0))[0] / 250 for image in images]
        return torch.tensor([[np.cos(a), np.sin(a)] for a in angles])
