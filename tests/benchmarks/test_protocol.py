"""The protocol: its statistics, its plan, the search for settings, and the reported concepts."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from new_words import FakeWorld
from PIL import Image

import toybox
from iteris_core.score.row_scores import collapse_rate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import alike_concepts  # noqa: E402
import reported_concepts  # noqa: E402
from protocol.figures import stat  # noqa: E402
from protocol.plan import sets_of, styled_pairs  # noqa: E402
from protocol.runs import Runs  # noqa: E402
from protocol.settings import Chosen  # noqa: E402
from protocol.tuning import Tuning  # noqa: E402


def test_a_mean_hides_what_the_collapse_rate_shows():
    alike, one_lost = [0.65, 0.65, 0.65, 0.65], [0.8, 0.8, 0.8, 0.2]
    assert sum(alike) == pytest.approx(sum(one_lost))
    assert collapse_rate(alike, 0.6) == 0
    assert collapse_rate(one_lost, 0.6) == 0.25
    assert collapse_rate([0.6], 0.6) == 0  # below, not at
    assert collapse_rate([0.5, math.nan], 0.6) == 1  # only of what is judged
    assert math.isnan(collapse_rate([math.nan], 0.6))


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


def test_every_subject_of_a_styled_pair_is_there_once():
    subjects, styles = [f"s{i}" for i in range(10)], ["flat", "shaded"]
    pairs = styled_pairs(subjects, styles, 0)
    assert sorted(subject for subject, _ in pairs) == subjects
    assert [style for _, style in pairs] == styles * 5
    assert styled_pairs(subjects, [], 0) == []


def test_settings_are_kept_by_number_and_regime(tmp_path):
    file = tmp_path / "settings.json"
    chosen = Chosen(file, {"ties": {"density": 0.8}, "ssr": {"ridge": 1e-2}})
    chosen.keep("ties", 5, "default", {"density": 0.5})
    chosen.keep("ssr", 5, "few", {"ridge": 1e-4})
    again = Chosen(file, {"ties": {"density": 0.8}, "ssr": {"ridge": 1e-2}})
    # Of a method that only looks at weights both regimes are one.
    assert again("ties", 5, "few") == again("ties", 5, "default") == {"density": 0.5}
    assert again("ties", 2, "default") == {"density": 0.8}
    assert again("ties", 7, "default") == {"density": 0.5}, "of the most that were searched"
    assert again("ssr", 5, "few") == {"ridge": 1e-4}
    assert again("ssr", 5, "default") == {"ridge": 1e-2}
    assert [again.known("ssr", 5, regime) for regime in ("few", "default")] == [True, False]
    assert again("iteris", 5, "default") == {}


class ScaledWorld(FakeWorld):
    """A merge's picture tells how near its change of one site is to 55 % of the LoRAs' sum."""

    def draw(self, lora, wanted):
        names = {name for w in wanted for name in w.shown}
        if not names or lora is None:
            return super().draw(lora, wanted)
        site = next(iter(lora.sites))
        whole = sum(self.loras[name].sites[site].dense() for name in names)
        scale = float(lora.sites[site].dense().norm() / whole.norm())
        return [
            Image.new("RGB", (4, 4), (round(200 - 200 * abs(scale - 0.55)),) * 3) for _ in wanted
        ]


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
