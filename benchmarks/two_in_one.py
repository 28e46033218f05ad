"""Two concepts in one picture, from one merged LoRA: ``unseen.py --world pairs``.

On the reported concepts, each two neighbours of a set side by side and the ends as well,
:data:`SEEDS` pictures a pair.

``pair`` has one prompt that names both. ``halves`` has a prompt for each half, of two of its
concept, as regional prompts do: the same LoRA, and twice the time of a picture. ``right`` is the
share of shapes, patterns and colours that the judge reads rightly in each half, ``complete`` the
share of pictures in which it reads both shapes. ``new words`` are pictures of each concept alone.

``composite`` is no merge: each LoRA denoises its own half.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from outputs import QUICK
from PIL import Image
from protocol.drawing import changed, noise_of
from protocol.plan import BASE, Plan, Unit
from protocol.runs import Entry, Runs
from protocol.toybox import NEW, ToyboxWorld
from protocol.world import Wanted
from torch import Tensor

from iteris_core import Lora

SEEDS = 1 if QUICK else 8
KINDS = ("pair", "halves")
ALONE = "new words"
COMPOSITE = "composite"


def pairs(world: ToyboxWorld, names: Sequence[str], seed: int) -> list[Wanted]:
    """Each two neighbours side by side, the ends as well."""
    neighbours = zip(names, [*names[1:], names[0]], strict=True)
    return [Wanted(two, _prompt(world, two, two), seed) for two in neighbours]


def _prompt(world: ToyboxWorld, shown: Sequence[str], among: Sequence[str]) -> str:
    """Of ``shown``, on a background that no row has and that suits all of ``among``."""
    known = world.known
    background = next(b for b in NEW if all(b in known[n].backgrounds for n in among))
    things = " left of ".join(f"a {name} {known[name].class_word}" for name in shown)
    return f"{things} on a {background} background"


def prompts_of_halves(world: ToyboxWorld, wanted: Sequence[Wanted]) -> list[list[str]]:
    """For each half a prompt of two of its own concept, so that no other one is named and each
    thing has its place."""
    return [[_prompt(world, [one.shown[at]] * 2, one.shown) for one in wanted] for at in (0, 1)]


def side_by_side(
    world: ToyboxWorld,
    parts: Sequence[tuple[Lora | None, Sequence[str]]],
    pictures: Sequence[Wanted],
) -> list[Image.Image]:
    """At every step each of two LoRAs with a prompt for each picture predicts the whole picture, of
    which its half is taken."""
    pipeline, host = world.pipeline, world.host
    words: list[Any] = []
    for lora, prompts in parts:
        with changed(host, lora):
            words.append(pipeline.encode_prompt(prompts, pipeline.device, 1, True))
    plain = pipeline.unet.forward

    def whole(sample: Tensor, timestep: Any, **given: Any) -> tuple[Tensor]:
        halves: list[Tensor] = []
        for at, (lora, _) in enumerate(parts):
            given["encoder_hidden_states"] = torch.cat(words[at][::-1])
            with changed(host, lora):
                halves.append(plain(sample, timestep, **given)[0].chunk(2, -1)[at])
        return (torch.cat(halves, -1),)

    with patch.object(pipeline.unet, "forward", whole):
        return pipeline(
            prompt_embeds=words[0][0],
            negative_prompt_embeds=words[0][1],
            generator=[noise_of(one) for one in pictures],
            **world.sampling,
        ).images


def read_halves(
    world: ToyboxWorld, images: Sequence[Image.Image], wanted: Sequence[Wanted]
) -> list[dict[str, float]]:
    """The share of shape, pattern and both colours of both things that is read rightly in their
    halves, and whether both shapes are."""
    found: list[dict[str, float]] = []
    for seen, one in zip(world.judge.read_halves(images), wanted, strict=True):
        both = list(zip(seen, (world.known[name].thing for name in one.shown), strict=True))
        right = sum(sum(half.matches(thing)) for half, thing in both) / 8
        complete = all(half.shape == thing.shape for half, thing in both)
        found.append({"right": right, "complete": float(complete)})
    return found


class PairPlan(Plan):
    """What bounds a set is measured with its merges; nothing of a LoRA alone."""

    def references(self) -> Iterator[Unit]:
        yield from ()

    def merges(self) -> Iterator[Unit]:
        bounds = Unit(COMPOSITE), Unit(BASE)
        return Plan.merges(replace(self, variants=[*self.variants, *bounds]))


class PairRuns(Runs):
    world: ToyboxWorld

    def measure(self, unit: Unit) -> Entry:
        """What is drawn of a merge of the unit's concepts, or of one of the two bounds."""
        if unit.method == COMPOSITE:
            concepts = self.world.concepts(unit.names, unit.trained)
            return self._rows({concept.name: concept.lora for concept in concepts})
        lora, entry = self._merged(unit)
        alone = self._of(lora, ALONE, unit)
        return {**entry, **self._rows(dict.fromkeys(unit.names, lora)), ALONE: alone}

    def _rows(self, loras: Mapping[str, Lora | None]) -> Entry:
        """Each half is denoised by the LoRA that is its concept's in ``loras``."""
        world = self.world
        every = [one for seed in range(1, SEEDS + 1) for one in pairs(world, list(loras), seed)]
        found: dict[str, list[object]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            for shown in dict.fromkeys(wanted.shown for wanted in every):
                order = [wanted for wanted in every if wanted.shown == shown]
                images = self._drawn(kind, [loras[name] for name in shown], order)
                read = read_halves(world, images, order)
                found[kind] += [[" ".join(shown), figures] for figures in read]
        return found

    def _drawn(
        self, kind: str, own: list[Lora | None], order: list[Wanted]
    ) -> Sequence[Image.Image]:
        if kind == "pair" and own[0] is own[1]:
            return self.world.draw(own[0], order)
        named = [[one.prompt for one in order]] * 2
        prompts = named if kind == "pair" else prompts_of_halves(self.world, order)
        return side_by_side(self.world, list(zip(own, prompts, strict=True)), order)
