"""Several concepts in one picture: whose LoRA and prompt denoises which region."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import two_in_one
from protocol.in_a_row import by_windows, ring
from protocol.plan import Unit
from protocol.toybox import ToyboxWorld
from protocol.world import Wanted

NAMES = ("sks1", "sks4", "sks6", "sks7", "sks8")


class Rows:
    """Draws nothing, and keeps what was to be drawn. A quarter of a picture's attributes is right,
    or all where regions have a prompt of their own."""

    def __init__(self) -> None:
        self.drawn: list[tuple] = []

    def concepts(self, names, trained):
        return [SimpleNamespace(name=name, lora=f"LoRA of {name}") for name in names]

    def rows(self, names, count, seed):
        return [Wanted(shown, " and ".join(shown), seed) for shown in ring(names, count)]

    def prompts_of_regions(self, wanted):
        regions = range(len(wanted[0].shown))
        return [[f"two of {one.shown[at]}" for one in wanted] for at in regions]

    def draw_row(self, parts, wanted):
        self.drawn.append((parts, wanted))
        return [parts[0][1] != parts[1][1]] * len(wanted)

    def draw(self, lora, wanted):
        raise AssertionError("a composition is drawn by regions")

    def row_read(self, images, wanted):
        return [(1.0 if own else 0.25, own) for own in images]


@pytest.mark.parametrize("names", [NAMES[:2], NAMES[:3], NAMES])
def test_each_region_is_its_own_concept_s_in_all_orders(names, tmp_path):
    world = Rows()
    runs = two_in_one.RowRuns(world, tmp_path / "runs.jsonl")
    found = runs.measure(Unit("composite", names))
    pictures = len(names) * two_in_one.SEEDS
    expected = {"pair": {"right": 0.25, "complete": 0.0}}
    expected["halves"] = expected["three"] = {"right": 1.0, "complete": 1.0}
    assert set(found) == {"pair", "halves", "three"} - ({"three"} if len(names) == 2 else set())
    for kind, rows in found.items():
        assert len(rows) == pictures
        assert all(of == expected[kind] for _, of in rows)
        count = two_in_one.KINDS[kind]
        assert {shown for shown, _ in rows} == {" ".join(of) for of in ring(names, count)}
    for parts, wanted in world.drawn:
        (shown,) = {one.shown for one in wanted}
        assert [lora for lora, _ in parts] == [f"LoRA of {name}" for name in shown]
        named = [{" and ".join(shown), f"two of {name}"} for name in shown]
        assert all(set(prompts) < of for (_, prompts), of in zip(parts, named, strict=True))


def test_two_windows_of_one_region_are_averaged():
    sample = torch.arange(12.0).reshape(1, 1, 12)
    seen: list[tuple[int, list[float]]] = []

    def denoise(region, window):
        seen.append((region, window.flatten().tolist()))
        return window * 0 + 10 * region + len(seen)

    found = by_windows(sample, 2, 6, denoise)
    first, second = list(map(float, range(6))), list(map(float, range(3, 9)))
    assert seen[:3] == [(0, first), (1, first), (1, second)]
    # Calls are counted from one: of the second region they are the second and the third.
    regions = (1, (12 + 13) / 2, (24 + 25) / 2, 36)
    assert found.flatten().tolist() == [value for value in regions for _ in range(3)]


@pytest.fixture(scope="module")
def world():
    return ToyboxWorld()


def test_a_half_s_prompt_names_its_own_concept_alone_on_the_same_background(world):
    (first, second) = world.rows(("sks1", "sks4"), 2, 1)
    left, right = world.prompts_of_regions([first, second])
    background = first.prompt.partition(" on a ")[2]
    assert left[0] == f"a sks1 star left of a sks1 star on a {background}"
    assert right[0] == f"a sks4 circle left of a sks4 circle on a {background}"
    assert (left[1], right[1]) == (right[0], left[0])


def test_halves_of_one_prompt_and_one_lora_are_the_whole_picture(world):
    (wanted, _) = world.rows(("sks1", "sks4"), 2, 1)
    (concept,) = world.concepts(("sks1",), 0)
    (whole,) = world.draw(concept.lora, [wanted])
    half = (concept.lora, [wanted.prompt])
    (halves,) = world.draw_row([half, half], [wanted])
    assert max(abs(a - b) for a, b in zip(whole.tobytes(), halves.tobytes(), strict=True)) <= 1
    (base,) = world.draw(None, [wanted])
    (mixed,) = world.draw_row([half, (None, [wanted.prompt])], [wanted])
    assert mixed.tobytes() not in (whole.tobytes(), base.tobytes())
