"""Prompts that no calibration row had: the statistics, the plan, and a run of it."""

from __future__ import annotations

import json
import re

import page_tables
import pytest
import unseen
from new_words import FakeWorld
from PIL import Image
from protocol import digests
from protocol.digests import digests_of
from protocol.figures import against, figures, joined, row, rows_of_size, verdict
from protocol.plan import BASE, SINGLE, Plan, Variant
from protocol.runs import Runs, pixels
from search_settings import searched
from worlds import WORLDS


def test_a_verdict_is_what_the_interval_leaves_out():
    assert verdict((0.01, 0.2)) == verdict((-0.2, -0.01), less=True) == "first"
    assert verdict((-0.2, -0.01)) == verdict((0.01, 0.2), less=True) == "behind"
    assert verdict((-0.1, 0.2)) == verdict((0.0, 0.2)) == "level"
    assert verdict(None) == "unknown"


def test_differences_are_paired_by_set():
    """Sets differ by far more than the methods do in each of them."""
    sets = [(0, ("a", "b")), (0, ("c", "d")), (1, ("a", "c"))]
    ours = dict(zip(sets, (0.1, 0.5, 0.9), strict=True))
    theirs = dict(zip(sets, (0.08, 0.47, 0.88), strict=True)) | {(1, ("b", "d")): 0.0}
    found = against(ours, theirs, less=False)
    assert found["n"] == 3
    assert found["mean"] == pytest.approx(0.07 / 3)
    # Student's t of two degrees of freedom, 4.303, times the standard error .01 / 3.
    assert found["interval"][1] - found["mean"] == pytest.approx(4.303 * 0.01 / 3, rel=1e-3)
    assert found["verdict"] == "first"
    assert against(ours, theirs, less=True)["verdict"] == "behind"
    assert against(ours, {sets[0]: 0.0}, less=False)["verdict"] == "unknown"


def test_a_variant_has_fields_of_its_method_and_of_the_calibration():
    found = Variant.parsed("ssr@searched:ridge=1e-4:samples=20:latents=noise")
    assert (found.method, found.searched) == ("ssr", True)
    assert found.settings == {"ridge": 1e-4}
    assert found.calibration == {"samples": 20, "latents": "noise"}
    trial = found.unit(("a", "b"), 1, 0, lambda *_: {"ridge": 1.0, "micro_batch": 8})
    assert trial.settings == {"ridge": 1e-4, "micro_batch": 8}
    plain = Variant.parsed("ssr").unit(("a", "b"), 1, 0, lambda *_: {"ridge": 1.0})
    assert plain.settings == {}
    assert plain.key != trial.key
    with pytest.raises(ValueError, match="@searched"):
        Variant.parsed("ssr@best")


def of(likeness: float, distance: float) -> dict:
    return {
        "new words": [["a", {"likeness": likeness, "scene": 1.0}]],
        "spread": [["a", {"share": distance}]],
    }


def test_a_row_has_what_is_kept_of_each_lora_alone():
    found = row(of(0.6, 0.03), of(0.8, 0.04), of(0.4, 0.4), ("new words", "spread"))
    assert found["new words"]["likeness kept"] == pytest.approx(0.5)
    assert found["spread"]["share"] == pytest.approx(0.75)
    unlearned = row(of(0.6, 0.03), of(0.42, 0.04), of(0.4, 0.4), ("new words",))
    assert "likeness kept" not in unlearned["new words"]
    both = joined([of(0.8, 0.1), of(0.4, 0.3)], ("new words", "spread"))
    assert [len(rows) for rows in both.values()] == [2, 2]


def test_pixels():
    black, white = (Image.new("RGB", (4, 4), colour) for colour in ("black", "white"))
    assert pixels(black, white) == 1
    assert pixels(white, white) == 0


def test_a_run_of_the_plan_goes_on_where_it_stopped(host, tmp_path):
    world = FakeWorld(host)
    variants = [Variant.parsed(label) for label in ("iteris", "average", "iteris:samples=1")]
    plan = Plan(world, variants, [2], 1, lambda *_: {})
    alone = Runs(world, tmp_path / "alone.jsonl")
    merged = Runs(world, tmp_path / "runs.jsonl")
    assert alone.run(plan.references())
    assert len(alone.known) == 2 * 4
    assert merged.run(trial for _, trial in plan.merges())
    drawn = len(world.drawn)
    again = Runs(world, tmp_path / "runs.jsonl")
    assert again.run(trial for _, trial in plan.merges())
    assert len(world.drawn) == drawn
    found = json.loads(json.dumps(figures(rows_of_size(plan, 2, alone, again), "iteris")))
    assert list(found["rows"]) == [SINGLE, BASE, "iteris", "average", "iteris:samples=1"]
    new = found["rows"]["iteris"]["new words"]
    assert new["likeness kept"]["mean"] == pytest.approx(0.5)
    assert new["likeness kept"]["n"] == 2
    assert found["rows"][BASE]["no trigger"]["likeness"]["mean"] == pytest.approx(1)
    assert found["rows"][BASE]["no trigger"]["pixels"]["mean"] == 0
    assert found["rows"]["iteris"]["no trigger"]["pixels"]["mean"] == pytest.approx(0.3922)
    assert found["rows"]["iteris"]["spread"]["share of pixels"]["mean"] == pytest.approx(1)
    assert found["against"][BASE]["new words"]["likeness"]["verdict"] == "first"
    assert found["against"][BASE]["no trigger"]["pixels"]["verdict"] == "behind"
    assert found["against"][SINGLE]["seen"]["judge"]["verdict"] == "behind"
    assert found["against"]["average"]["seen"]["judge"]["verdict"] == "level"
    assert "spread" not in found["against"]["average"]


def test_rows_of_different_code_are_not_mixed(host, tmp_path):
    world = FakeWorld(host)
    plan = Plan(world, [Variant.parsed("average")], [2], 1, lambda *_: {})
    units = [unit for _, unit in plan.merges()]
    runs = Runs(world, tmp_path / "runs.jsonl")
    assert runs.run(units)
    assert runs.known[units[0].key]["code"] == digests_of("average", ())
    assert runs.stale(units) == []
    older = {**digests_of("average", ()), "core": "0" * 12}
    runs.known[units[0].key]["code"] = older
    with pytest.raises(SystemExit, match="rows of average were made with different code"):
        runs.stale(units)
    for unit in units:
        runs.known[unit.key]["code"] = older
    assert runs.stale(units) == ["average"]
    del runs.known[units[0].key]["code"]  # as rows are that have no digest
    assert runs.stale(units) == ["average"]


def test_a_digest_is_of_what_a_merge_writes_and_of_what_it_is_measured_on(tmp_path, monkeypatch):
    assert len({digests.core(method) for method in ("iteris", "average", "sum", "ssr")}) == 4
    assert digests.core("iteris") != digests.core("no method")
    monkeypatch.setattr(digests, "ROOT", tmp_path)
    made: list[str] = []
    for text in ("one", "two", "one"):
        digests.world.cache_clear()
        (tmp_path / "words.txt").write_text(text)
        (tmp_path / "notes.md").write_text(f"{len(made)}")
        made.append(digests.world((tmp_path,)))
    assert made[0] == made[2] != made[1]
    digests.world.cache_clear()


def test_merges_are_calibrated_on_the_half(host, tmp_path):
    world = FakeWorld(host)
    runs = Runs(world, tmp_path / "runs.jsonl")
    trial = Variant.parsed("iteris:samples=9").unit(("s0", "s1"), 3, 0, lambda *_: {})
    found = runs.calibration(trial)
    assert (found.templates, found.samples, found.seed) == (("a {}",), 9, 3)


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.mark.slow
def test_the_toybox_on_new_words(tmp_path):
    world = WORLDS["toybox"]()
    known = set().union(*(words(template) for template in world.half["templates"]))
    for name in world.subjects:
        (concept,) = world.concepts([name], 0)
        for kind in ("new words", "spread"):
            for wanted in world.prompted(kind, [name], 1):
                new = words(wanted.prompt) - known - {name, concept.class_word}
                assert new == {wanted.scene}
        seen = {wanted.prompt for wanted in world.prompted("seen", [name], 1)}
        assert all(words(prompt) <= known | {name, concept.class_word} for prompt in seen)
    plain = world.prompted("no trigger", world.subjects, 1)
    assert not any(words(wanted.prompt) & set(world.subjects) for wanted in plain)

    quick = [Variant.parsed(label) for label in ("iteris:samples=4:timesteps=1", "average")]
    plan = Plan(world, quick, [2], 1, searched, per_size=1)
    alone = Runs(world, tmp_path / "alone.jsonl")
    merged = Runs(world, tmp_path / "runs.jsonl")
    assert alone.run(plan.references())
    assert merged.run(trial for _, trial in plan.merges())
    data = unseen.results(plan, alone, merged)
    rows = data["sizes"]["2"]["rows"]
    for kind in ("seen", "new words"):
        assert rows[SINGLE][kind]["judge"]["mean"] > 0.9
        assert rows[SINGLE][kind]["scene"]["mean"] > 0.9
        assert rows[BASE][kind]["likeness"]["mean"] < rows[SINGLE][kind]["likeness"]["mean"] - 0.1
    assert rows["average"]["no trigger"]["scene"]["mean"] > 0.9
    assert any(line.startswith("| average | 1 |") for line in page_tables.unseen(data, "2"))
