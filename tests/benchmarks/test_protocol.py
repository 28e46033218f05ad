"""The protocol: its statistics, its plan, the search for settings, and the reported concepts."""

from __future__ import annotations

import json
import math

import pytest
import reported_concepts
from new_words import FakeWorld
from PIL import Image
from protocol.figures import stat
from protocol.plan import sets_of, styled_pairs
from protocol.runs import Runs
from search_settings import search, searched

import toybox
from iteris_core.score.row_scores import collapse_rate


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


def test_settings_are_kept_by_number(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"ties": {"default": {"2": {"density": 0.8}, "5": {"density": 0.5}}}}')
    assert searched("ties", 5, file) == {"density": 0.5}
    assert searched("ties", 3, file) == {}
    assert searched("ties", 7, file) == {"density": 0.5}, "of the most that were searched"
    assert searched("iteris", 5, file) == {}


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
    file = tmp_path / "settings.json"
    runs = Runs(world, tmp_path / "runs.jsonl")
    assert not search(runs, file, ["task-arithmetic"], seconds=-1)
    assert search(runs, file, ["task-arithmetic"])
    found = {k: searched("task-arithmetic", k, file)["scale"] for k in world.sizes}
    assert found == {2: 0.55, 4: 0.55}
    measured = len(runs.known)
    assert search(runs, file, ["task-arithmetic"])
    assert len(runs.known) == measured


def test_the_reported_concepts_are_what_the_rule_gives():
    entries = reported_concepts.reported()
    assert json.loads((reported_concepts.ROOT / "world.json").read_text())["concepts"] == entries
    classes = [entry["class_word"] for entry in entries]
    assert classes.count("star") >= 3
    assert classes.count("circle") >= 2
    own = {c.thing for c in (toybox.concepts() | toybox.pivotal_concepts()).values()}
    reported = {c.thing for c in toybox.concepts(reported_concepts.ROOT).values()}
    assert len(own | reported) == len(own) + len(reported)


def test_reported_concepts_have_their_files():
    for token, concept in toybox.concepts(reported_concepts.ROOT).items():
        assert len(concept.references) == 6
        assert concept.lora.stat().st_size < 300_000
        assert concept.lora.read_bytes() != toybox.concepts()[token].lora.read_bytes()
