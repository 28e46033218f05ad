"""The open benchmark: a stranger's method is a folder with a function and a settings file."""

from __future__ import annotations

import json

import open_bench
import pytest
import standings
from new_words import FakeWorld
from protocol.plan import Plan, Variant
from protocol.runs import Runs

METHOD = """
from iteris_core import merge_loras

def merge(host, concepts, calibration, scale):
    return merge_loras(host, concepts, "task-arithmetic", settings={"scale": scale}).lora
"""


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "method.py").write_text(METHOD)
    (folder / "settings.json").write_text('{"scale": 0.5}')
    return folder


def test_a_stranger_s_method_is_merged_drawn_and_judged(host, folder, tmp_path):
    merge, settings = open_bench.loaded(folder)
    world = FakeWorld(host)
    merged = open_bench.OpenRuns(world, tmp_path / "mine.jsonl", merge)
    plan = Plan(world, [Variant("mine", "mine", settings, {})], [2], 1, lambda *_: {}, 2)
    found = open_bench.measured("mine", plan, Runs(world, tmp_path / "alone.jsonl"), merged)
    assert found["settings"] == {"scale": 0.5}
    of = found["sizes"]["2"]
    assert of["figures"]["new words"]["likeness kept"]["mean"] == pytest.approx(0.5)
    assert of["figures"]["new words"]["likeness kept"]["n"] == 2
    assert set(of["costs"]) == {"seconds", "rank", "bytes"}
    # The function's own merge, at its settings.
    names = plan.sets(2, 0)[0]
    unit = plan.variants[0].unit(names, 0, 0, lambda *_: {})
    lora = merged.lora_of(unit, world.concepts(names, 0))
    site = next(iter(lora.sites))
    whole = sum(world.loras[name].sites[site].dense() for name in names)
    assert (lora.sites[site].dense() - 0.5 * whole).norm() < 1e-5 * whole.norm()


def test_a_folder_without_a_method_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"method\.py is missing"):
        open_bench.loaded(tmp_path)
    (tmp_path / "method.py").write_text("merged = 1")
    with pytest.raises(SystemExit, match="no function merge"):
        open_bench.loaded(tmp_path)


def test_the_standings_have_it_among_the_others(tmp_path):
    def figure(mean):
        return {"mean": mean, "interval": [mean - 0.1, mean + 0.1], "n": 3}

    def row(mean):
        return {"new words": {"likeness": figure(mean), "likeness kept": figure(mean)}}

    known = {"iteris": row(0.7), "sum": row(0.2), "single": row(0.9)}
    (tmp_path / "unseen_reported.json").write_text(json.dumps({"sizes": {"2": {"rows": known}}}))
    key = json.dumps(["iteris", ["a", "b"], 0, {}, 0, {}])
    run = {"key": key, "seconds": 8.0, "rank": 16, "bytes": 2**21}
    (tmp_path / "unseen_reported_runs.jsonl").write_text(json.dumps(run))
    (tmp_path / "open").mkdir()
    costs = {"seconds": 1.0, "rank": 8, "bytes": 2**20}
    entry = {
        "method": "mine",
        "world": "reported",
        "sizes": {"2": {"figures": row(0.4), "costs": costs}},
    }
    (tmp_path / "open" / "mine.json").write_text(json.dumps(entry))
    found = standings.rows("2", folder=tmp_path)
    order = ["each LoRA alone", "iteris", "mine", "all loaded at once"]
    assert list(found) == [f"{name}, n = 3" for name in order]
    assert found["mine, n = 3"][0].se == pytest.approx(0.1)
    assert found["iteris, n = 3"][-3:] == [8.0, 16, 2.0]
    assert found["mine, n = 3"][-3:] == [1.0, 8, 1.0]
    assert found["all loaded at once, n = 3"][-3:] == [None] * 3
    page = standings.page(folder=tmp_path)
    assert "mine" in page
    assert "likeness kept" in page
