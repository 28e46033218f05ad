"""The protocol: its statistics, its plan, runs that resume, and the search for settings."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import random_lora

from iteris_core import Concept
from iteris_core.methods import find_method
from iteris_core.settings import declared_settings

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import reported_concepts  # noqa: E402
from protocol.digests import digests_of  # noqa: E402
from protocol.figures import against, figures, row, rows_of_size, stat  # noqa: E402
from protocol.plan import BASE, SINGLE, Plan, Variant, sets_of  # noqa: E402
from protocol.runs import Runs  # noqa: E402
from protocol.world import KINDS, Wanted  # noqa: E402
from search_settings import GRIDS  # noqa: E402


class FakeWorld:
    """Concepts whose likeness is a number of the LoRA."""

    subjects, sizes, kinds = ("s0", "s1", "s2", "s3"), (2, 4), KINDS
    trained, calls = 1, 4
    roots = ()

    def __init__(self, host):
        self.host = host
        self.calibration = {"templates": ("a {} in a picture",)}
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

    def embedded(self, images):
        angles = [image.getpixel((0, 0))[0] / 250 for image in images]
        return torch.tensor([[np.cos(a), np.sin(a)] for a in angles])


def test_intervals_are_students_over_sets():
    found = stat([0.6, 0.7, 0.8])
    assert found["mean"] == pytest.approx(0.7)
    assert found["se"] == pytest.approx(0.1 / 3**0.5)
    low, high = found["interval"]
    assert (high - low) / 2 == pytest.approx(4.303 * found["se"])
    assert stat([0.6]) == {"mean": 0.6, "se": None, "interval": None, "n": 1}


def test_differences_are_paired_by_set():
    """Sets differ by far more than the methods do in each of them."""
    sets = [(0, ("a", "b")), (0, ("c", "d")), (1, ("a", "c"))]
    ours = dict(zip(sets, (0.1, 0.5, 0.9), strict=True))
    theirs = dict(zip(sets, (0.08, 0.47, 0.88), strict=True)) | {(1, ("b", "d")): 0.0}
    found = against(ours, theirs, less=False)
    assert (found["n"], found["verdict"]) == (3, "first")
    assert found["mean"] == pytest.approx(0.07 / 3)
    # Student's t of two degrees of freedom, 4.303, times the standard error .01 / 3.
    assert found["interval"][1] - found["mean"] == pytest.approx(4.303 * 0.01 / 3, rel=1e-3)
    assert against(ours, theirs, less=True)["verdict"] == "behind"
    wide = against(ours, dict(zip(sets, (0.5, 0.1, 0.9), strict=True)), less=False)
    assert wide["verdict"] == "level"
    assert against(ours, {sets[0]: 0.0}, less=False)["verdict"] == "unknown"


def test_a_row_has_what_is_kept_of_each_lora_alone():
    def of(likeness: float) -> dict:
        return {"new words": [["a", {"likeness": likeness, "scene": 1.0}]]}

    found = row(of(0.6), of(0.8), of(0.4), ("new words",))
    assert found["new words"]["likeness kept"] == pytest.approx(0.5)
    unlearned = row(of(0.6), of(0.42), of(0.4), ("new words",))
    assert "likeness kept" not in unlearned["new words"]


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
    found = Variant.parsed("ssr@searched:ridge=1e-4:samples=20:latents=noise")
    assert (found.method, found.searched) == ("ssr", True)
    assert found.calibration == {"samples": 20, "latents": "noise"}
    trial = found.unit(("s0", "s1"), 3, 0, lambda *_: {"ridge": 1.0, "micro_batch": 8})
    assert trial.settings == {"ridge": 1e-4, "micro_batch": 8}
    plain = Variant.parsed("ssr").unit(("s0", "s1"), 3, 0, lambda *_: {"ridge": 1.0})
    assert plain.settings == {}
    assert plain.key != trial.key
    runs = Runs(FakeWorld(host), tmp_path / "runs.jsonl")
    calibration = runs.calibration(trial)
    assert calibration.templates == ("a {}",)
    assert (calibration.samples, calibration.seed) == (20, 3)


def test_a_run_of_the_plan_goes_on_where_it_stopped(host, tmp_path):
    world = FakeWorld(host)
    variants = [Variant.parsed(label) for label in ("iteris", "average", "iteris:samples=1")]
    plan = Plan(world, variants, [2], 1, lambda *_: {})
    alone = Runs(world, tmp_path / "alone.jsonl")
    merged = Runs(world, tmp_path / "runs.jsonl")
    assert alone.run(plan.references())
    assert merged.run(trial for _, trial in plan.merges())
    drawn = len(world.drawn)
    again = Runs(world, tmp_path / "runs.jsonl")
    assert again.run(trial for _, trial in plan.merges())
    assert len(world.drawn) == drawn
    found = json.loads(json.dumps(figures(rows_of_size(plan, 2, alone, again), "iteris")))
    rows = found["rows"]
    assert list(rows) == [SINGLE, BASE, "iteris", "average", "iteris:samples=1"]
    assert rows["iteris"]["new words"]["likeness kept"]["mean"] == pytest.approx(0.5)
    assert rows["iteris"]["new words"]["likeness kept"]["n"] == 2
    assert rows[BASE]["no trigger"]["pixels"]["mean"] == 0
    assert found["against"][BASE]["new words"]["likeness"]["verdict"] == "first"
    assert found["against"][BASE]["no trigger"]["pixels"]["verdict"] == "behind"
    assert found["against"]["average"]["seen"]["judge"]["verdict"] == "level"


def test_rows_of_different_code_are_not_mixed(host, tmp_path):
    world = FakeWorld(host)
    plan = Plan(world, [Variant.parsed("average")], [2], 1, lambda *_: {})
    units = [unit for _, unit in plan.merges()]
    runs = Runs(world, tmp_path / "runs.jsonl")
    assert runs.run(units)
    assert runs.stale(units) == []
    older = {**digests_of("average", ()), "core": "0" * 12}
    runs.known[units[0].key]["code"] = older
    with pytest.raises(SystemExit, match="rows of average were made with different code"):
        runs.stale(units)
    for unit in units:
        runs.known[unit.key]["code"] = older
    assert runs.stale(units) == ["average"]


@pytest.mark.parametrize("method", GRIDS)
def test_a_grid_is_of_the_method_s_settings(method):
    declared = declared_settings(find_method(method).settings)
    for name, values in GRIDS[method].items():
        for value in values:
            declared[name].check(value)


def test_the_reported_concepts_are_what_the_rule_gives():
    entries = reported_concepts.reported()
    assert json.loads((reported_concepts.ROOT / "world.json").read_text())["concepts"] == entries
