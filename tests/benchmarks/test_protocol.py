"""The protocol: its statistics, its plan, runs that resume, and the search for settings."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_lora

from iteris_core import Concept

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import blind  # noqa: E402
from captions import words_of  # noqa: E402
from protocol.figures import (  # noqa: E402
    Place,
    against,
    results,
    row,
    separated,
    stat,
    verdict,
)
from protocol.held_out import held_out, merged  # noqa: E402
from protocol.plan import BASE, SINGLE, Plan, Unit, sets_of  # noqa: E402
from protocol.runs import Runs, distance  # noqa: E402
from protocol.world import KINDS, Wanted  # noqa: E402


class FakeWorld:
    """Concepts whose likeness is a number of the LoRA."""

    subjects, kinds, trained = ("s0", "s1", "s2", "s3"), KINDS, 1

    def __init__(self, host):
        self.host = host
        self.words = frozenset({"spaceship"})
        self.half = {"templates": ("a {}",), "samples": 2, "timesteps": 1, "denoising_steps": 2}
        self.loras = {
            name: random_lora(host, seed, select=lambda site: "mid_block" in site)
            for seed, name in enumerate(self.subjects)
        }
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

    def pictures_of(self, name):
        return [Image.new("RGB", (4, 4), "red")]

    def embedded(self, images):
        angles = [image.getpixel((0, 0))[0] / 250 for image in images]
        return torch.tensor([[np.cos(a), np.sin(a)] for a in angles])


def cells(*values: float) -> dict:
    """A figure of one concept in each of several trainings."""
    return {Place(training, ("a",)): {"a": value} for training, value in enumerate(values)}


def test_an_interval_is_students_over_the_fewer_units():
    found = stat({Place(0, ("a", "b", "c")): {"a": 0.6, "b": 0.7, "c": 0.8}})
    wide = 4.303 * 0.1 / 3**0.5
    assert found["interval"] == pytest.approx([0.7 - wide, 0.7 + wide], abs=1e-4)
    assert (found["n"], found["concepts"], found["trainings"]) == (3, 3, 1)
    assert verdict(found) == "unknown: one training"
    alone = stat(cells(0.6, 0.7, 0.8))  # of one concept there is no interval
    assert (alone["interval"], verdict(alone)) == (None, "unknown")
    without = stat({Place(t, ("a",)): {"": v} for t, v in enumerate((0.6, 0.7, 0.8))})
    assert without["interval"] == found["interval"]
    assert verdict(without) == "first"


def test_an_interval_is_clustered_by_concept_and_training():
    """Against the three sums of Cameron, Gelbach and Miller, written out."""
    values = np.array([[0.1, 0.4, 0.9], [0.2, 0.6, 0.8], [0.3, 0.5, 0.4], [0.2, 0.1, 0.9]])
    found = stat(
        {Place(t, tuple("abc")): dict(zip("abc", of, strict=True)) for t, of in enumerate(values)}
    )
    off = (values - values.mean()) / values.size
    by_concept = 3 / 2 * (off.sum(0) ** 2).sum()
    by_training = 4 / 3 * (off.sum(1) ** 2).sum()
    both = 12 / 11 * (off**2).sum()
    assert found["error"] ** 2 == pytest.approx(by_concept + by_training - both)
    half = found["interval"][1] - found["mean"]
    assert half == pytest.approx(4.3027 * found["error"], rel=1e-4)
    assert (found["n"], found["sets"], found["least"]) == (3, 4, pytest.approx(0.4))


def test_a_table_is_corrected_by_holm():
    def of(mean: float, error: float | None = 1.0, trainings: int = 9):
        return {"mean": mean, "error": error, "n": 100, "trainings": trainings, "concepts": 100}

    # Of three tests the least chance is held to .05 / 3, the next to .05 / 2, the last to .05.
    assert separated([of(2.3), of(2.1), of(3.0)]) == [True, True, True]
    assert separated([of(2.1), of(2.1), of(3.0)]) == [False, False, True]
    assert separated([of(2.1), of(9.0, trainings=1), of(9.0, None)]) == [True, False, False]


def test_differences_are_paired():
    """Concepts differ by far more than the methods do in each of them."""
    names = "abcdef"
    levels = (0.1, 0.5, 0.9, 0.3, 0.7, 0.2)
    ours = {Place(t, tuple(names)): dict(zip(names, levels, strict=True)) for t in range(6)}

    def less(by):
        return {
            place: {n: v - by(i, place.training) for i, (n, v) in enumerate(of.items())}
            for place, of in ours.items()
        }

    theirs = less(lambda i, t: 0.02 + 0.01 * (i == 0) + 0.001 * t)
    found = against(ours, theirs | {Place(9, ("a",)): {"a": 1.0}}, less=False)
    assert (found["n"], found["verdict"]) == (6, "first")
    assert found["mean"] == pytest.approx(0.0225 + 0.01 / 6)
    assert against(ours, theirs, less=True)["verdict"] == "behind"
    even = less(lambda i, t: 0.01 * (-1) ** (i + t))
    assert against(ours, even, less=False)["verdict"] == "level"
    wide = less(lambda i, t: 0.3 * (-1) ** i)
    assert against(ours, wide, less=False)["verdict"] == "unknown"


def test_a_row_has_what_is_kept_of_each_lora_alone():
    def of(*likeness: float) -> dict:
        rows = [
            [name, {"likeness": v, "scene": 1.0}] for name, v in zip("ab", likeness, strict=False)
        ]
        return {"new words": rows}

    found = row(of(0.6, 0.5), of(0.8, 0.8), of(0.4, 0.6), ("new words",))["new words"]
    # The mean of the shares is the share of the means: (.55 - .5) / (.8 - .5).
    assert np.mean(list(found["likeness kept"].values())) == pytest.approx(0.05 / 0.3)
    unlearned = row(of(0.6), of(0.42), of(0.4), ("new words",))
    assert "likeness kept" not in unlearned["new words"]


def test_no_row_of_a_merge_has_a_word_of_evaluation(host, monkeypatch):
    monkeypatch.setattr(host, "_vocabulary", ["spaceship", "house"])
    world = FakeWorld(host)
    concepts = world.concepts(world.subjects[:2], 0)
    world.words = frozenset({"spaceship", "photo"})
    world.half = {"samples": 2, "timesteps": 1, "contexts": 1.0, "templates": ("a {}",)}
    with held_out(host, world.words):
        assert host._vocabulary == ["house"]
    assert merged(world, concepts).sites
    with pytest.raises(AssertionError, match=r"a calibration row has \['photo'\]"):
        merged(world, concepts, calibration={"templates": ("a photo of a {}",)})
    assert host._vocabulary == ["spaceship", "house"]


def test_words_of_a_compound_are_its_parts():
    assert words_of("A sky-blue sks1 star") == {"a", "sky", "blue", "sks", "star"}


@pytest.mark.parametrize(("size", "count"), [(2, 5), (3, 3), (5, 2), (7, 2), (10, 1)])
def test_sets_are_disjoint_as_far_as_there_are(size, count):
    subjects = [f"s{i}" for i in range(10)]
    sets = sets_of(subjects, size, 0)
    assert [len(set(some)) for some in sets] == [size] * count
    assert len({frozenset(some) for some in sets}) == count
    if size * count <= 10:
        assert len({name for some in sets for name in some}) == size * count
    assert sets == sets_of(subjects, size, 0)
    assert size == 10 or sets != sets_of(subjects, size, 1)


def test_a_variant_has_settings_of_its_own_and_is_calibrated_on_the_half(host, tmp_path):
    trial = replace(Unit.parsed("ssr:ridge=1e-4:samples=20:latents=noise"), replicate=3)
    assert trial.method == "ssr"
    assert trial.calibration == {"samples": 20, "latents": "noise"}
    assert trial.settings == {"ridge": 1e-4}
    assert trial.label == "ssr:ridge=0.0001:latents=noise:samples=20"
    assert Unit.of(trial.key) == trial
    assert Unit.parsed("ssr").settings == {}
    runs = Runs(FakeWorld(host), tmp_path / "runs.jsonl")
    calibration = runs.calibration(trial)
    assert calibration.templates == ("a {}",)
    assert (calibration.samples, calibration.seed) == (20, 3)


def test_a_run_of_the_plan_goes_on_where_it_stopped(host, tmp_path):
    world = FakeWorld(host)
    variants = [Unit.parsed(label) for label in ("iteris", "average", "iteris:samples=1")]
    plan = Plan(world, variants, [2], 1)
    alone = Runs(world, tmp_path / "alone.jsonl")
    merged = Runs(world, tmp_path / "runs.jsonl")
    assert alone.run(plan.references())
    assert merged.run(plan.merges())
    drawn = len(world.drawn)
    again = Runs(world, tmp_path / "runs.jsonl")
    assert again.run(plan.merges())
    assert len(world.drawn) == drawn
    found = results(alone.known, again.known)["sizes"]["2"]
    rows = found["rows"]
    assert list(rows) == [SINGLE, BASE, "iteris", "average", "iteris:samples=1"]
    assert rows["iteris"]["new words"]["likeness kept"]["mean"] == pytest.approx(0.5)
    assert rows["iteris"]["new words"]["likeness kept"]["sets"] == 2
    assert rows[BASE]["no trigger"]["pixels"]["mean"] == 0
    lead = found["against"][BASE]["new words"]["likeness"]
    assert (lead["n"], lead["verdict"]) == (4, "unknown: one training")
    assert rows["iteris"]["new words"]["likeness kept"]["collapsed"] == 0


def test_a_blind_page_hides_the_sides_and_counts_answers(host, tmp_path, monkeypatch):
    monkeypatch.setattr(blind, "FOLDER", tmp_path)
    monkeypatch.setattr(blind, "KEY", tmp_path / "key.json")
    blind.make(FakeWorld(host), ["average", "sum"], size=2, count=3)
    page = (tmp_path / "index.html").read_text()
    assert page.count("<fieldset>") == 3
    assert "average" not in page
    key = json.loads((tmp_path / "key.json").read_text())
    assert all(sorted(sides) == ["average", "sum"] for sides in key.values())
    chosen = {n: ("left", "right")[sides.index("average")] for n, sides in key.items()}
    answers = tmp_path / "answers.json"
    answers.write_text(json.dumps({**chosen, "3": "neither"}))
    # Wilson's interval of 2 of 2.
    assert blind.counted(answers).splitlines() == [
        "average: 2", "sum: 0", "neither: 1", "average: 100% of 2, 34% to 100%",
    ]  # fmt: skip


def test_the_kernel_distance_is_unbiased():
    """Of (x·y + 1)³, the mean within both sets less twice that between them, without pairs of one
    place; of one distribution 0 on average, also where the places of both go together."""

    def unit(vectors):
        return vectors / vectors.norm(dim=1, keepdim=True)

    def drawn(shift=0.0):
        return unit(torch.randn(7, 6, generator=g) + shift)

    def dense(x, y):
        places = [(i, j) for i in range(7) for j in range(7) if i != j]
        return np.mean([(x[i] @ x[j] + 1) ** 3 + (y[i] @ y[j] + 1) ** 3 - 2 * (x[i] @ y[j] + 1) ** 3
                        for i, j in places])  # fmt: skip

    def noisy(x):
        return unit(x + 0.3 * torch.randn(7, 6, generator=g)), unit(
            x + 0.3 * torch.randn(7, 6, generator=g)
        )

    g = torch.Generator().manual_seed(0)
    x, y = drawn(), drawn(0.5)
    assert distance(x, y) == pytest.approx(dense(x.double().numpy(), y.double().numpy()))
    for alike in ([distance(drawn(), drawn()) for _ in range(2000)],
                  [distance(*noisy(drawn())) for _ in range(2000)]):  # fmt: skip
        assert abs(np.mean(alike)) < 4 * np.std(alike) / len(alike) ** 0.5
        assert min(alike) < 0 < np.mean([distance(drawn(), drawn(0.5)) for _ in range(50)])
