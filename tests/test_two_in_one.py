"""Two concepts in one picture: whose LoRA and prompt denoises which half."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import two_in_one
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted

NAMES = ("sks1", "sks4", "sks6")


class Halves:
    """Draws nothing, and keeps what was to be drawn. Two of a picture's attributes are right, or
    all where both halves have a prompt of their own."""

    def __init__(self) -> None:
        self.drawn: list[tuple] = []

    def concepts(self, names, trained):
        return [SimpleNamespace(name=name, lora=f"LoRA of {name}") for name in names]

    def together(self, names, seed):
        return [
            Wanted(pair, " and ".join(pair), seed)
            for pair in zip(names, [*names[1:], names[0]], strict=True)
        ]

    def prompts_of_halves(self, wanted):
        return tuple([f"two of {one.shown[at]}" for one in wanted] for at in (0, 1))

    def draw_halves(self, left, right, wanted):
        self.drawn.append((left, right, wanted))
        return [left[1][0] != right[1][0]] * len(wanted)

    def draw(self, lora, wanted):
        raise AssertionError("a composition is drawn by halves")

    def halves_read(self, images, wanted):
        return [(1.0 if own else 0.25, own) for own in images]


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
def test_each_half_is_its_own_concept_s_in_both_orders(names):
    world = Halves()
    found = two_in_one.Bench(world).composite(names)
    pairs = 1 if len(names) == 2 else 3
    assert found == {
        "pair": [0.25] * pairs,
        "both": [0.0] * pairs,
        "halves": [1.0] * pairs,
        "halves, both": [1.0] * pairs,
    }
    for left, right, wanted in world.drawn:
        (shown,) = {one.shown for one in wanted}
        assert (left[0], right[0]) == tuple(f"LoRA of {name}" for name in shown)
        assert left[1][0] in (" and ".join(shown), f"two of {shown[0]}")
    orders = {wanted[0].shown for _, _, wanted in world.drawn}
    assert orders == {one.shown for one in world.together(names, 1)}
    assert sum(len(wanted) for _, _, wanted in world.drawn) == pairs * 2 * two_in_one.PICTURES


@pytest.fixture(scope="module")
def world():
    return ToyboxWorld()


def test_a_half_s_prompt_names_its_own_concept_alone_on_the_same_background(world):
    (first, second) = world.together(("sks1", "sks4"), 1)
    left, right = world.prompts_of_halves([first, second])
    background = first.prompt.partition(" on a ")[2]
    assert left[0] == f"a sks1 star left of a sks1 star on a {background}"
    assert right[0] == f"a sks4 circle left of a sks4 circle on a {background}"
    assert (left[1], right[1]) == (right[0], left[0])


def test_halves_of_one_prompt_and_one_lora_are_the_whole_picture(world):
    (wanted, _) = world.together(("sks1", "sks4"), 1)
    (concept,) = world.concepts(("sks1",), 0)
    (whole,) = world.draw(concept.lora, [wanted])
    half = (concept.lora, [wanted.prompt])
    (halves,) = world.draw_halves(half, half, [wanted])
    assert max(abs(a - b) for a, b in zip(whole.tobytes(), halves.tobytes(), strict=True)) <= 1
    (base,) = world.draw(None, [wanted])
    (mixed,) = world.draw_halves(half, (None, [wanted.prompt]), [wanted])
    assert mixed.tobytes() not in (whole.tobytes(), base.tobytes())
