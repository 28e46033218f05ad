"""The search for a rival's settings, on made-up scores."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest

from iteris_core.methods import all_methods, find_method
from iteris_core.settings import declared_settings

_FILE = Path(__file__).parents[2] / "benchmarks" / "rivals.py"
_SPEC = importlib.util.spec_from_file_location("rivals", _FILE)
rivals = importlib.util.module_from_spec(_SPEC)
sys.modules["rivals"] = rivals
_SPEC.loader.exec_module(rivals)


class Hill:
    """A score with its top at ``top``, by differences, or of logarithms where those are named."""

    def __init__(self, top, logs=()):
        self.top, self.logs, self.asked = top, logs, []

    def __call__(self, method, k, settings):
        assert (method, k) not in ((), None)
        assert settings not in self.asked, "asked twice"
        self.asked.append(dict(settings))

        def off(name):
            is_log = name in self.logs
            return (math.log(settings[name] / self.top[name]) if is_log
                    else settings[name] - self.top[name])  # fmt: skip

        return -sum(off(name) ** 2 for name in self.top)


def test_a_top_inside_the_grid_is_found_without_growing_it():
    hill = Hill({"scale": 0.56})
    assert rivals.tuned("task-arithmetic", 3, hill) == {"scale": 0.55}
    assert len(hill.asked) == 3


def test_a_grid_grows_until_the_top_is_inside():
    hill = Hill({"scale": 1.3})
    assert rivals.tuned("task-arithmetic", 3, hill) == {"scale": 1.3}
    asked = sorted(settings["scale"] for settings in hill.asked)
    assert asked[-1] > 1.3  # and the next one was worse
    hill = Hill({"ridge": 1e-7}, logs=("ridge",))
    assert rivals.tuned("ssr", 3, hill)["ridge"] == pytest.approx(1e-7)
    assert min(settings["ridge"] for settings in hill.asked) == pytest.approx(1e-8)


def test_a_grid_ends_at_the_setting_s_limit():
    best = rivals.tuned("dare-linear", 2, Hill({"density": 3.0, "scale": 0.6}))
    assert best == {"density": 1.0, "scale": 0.6}
    assert rivals.tuned("orthogonal", 2, Hill({"softness": -9.0, "scale": 0.7}))["softness"] == 0


def test_settings_that_go_together_are_found_together():
    """A ridge across the grid: the best of each alone is not the best of both."""

    def score(method, k, settings):
        density, scale = settings["density"], settings["scale"]
        return -((density + scale - 2.2) ** 2) * 9 - (density - scale + 0.8) ** 2

    best = rivals.tuned("ties", 5, score)
    around = [{**best, name: best[name] + step} for name in best for step in (-0.3, 0.3)]
    assert all(score("", 5, best) >= score("", 5, other) for other in around)


def test_words_are_tried_and_what_a_method_refuses_is_not():
    def score(method, k, settings):
        assert settings["density"] + settings["window"] / 2 <= 1
        return settings["density"] - settings["scale"]

    best = rivals.tuned("della", 2, score, {"della": {**rivals.GRIDS["della"]}})
    assert best["density"] + best["window"] / 2 == pytest.approx(1, abs=0.08)
    words = rivals.tuned("wudi", 2, lambda m, k, s: s["solution"] == "closed")
    assert words["solution"] == "closed"


def test_what_has_no_top_ends():
    best = rivals.tuned("task-arithmetic", 2, lambda m, k, s: s["scale"])
    assert best["scale"] > 1.5
    assert rivals.tuned("svd", 2, lambda m, k, s: 0.0) == {}


def test_the_score_may_depend_on_the_number_of_concepts():
    tops = {2: 0.7, 10: 0.25}
    found = {
        k: rivals.tuned("task-arithmetic", k, lambda m, k, s: -abs(s["scale"] - tops[k]))
        for k in tops
    }
    assert found == {2: {"scale": 0.7}, 10: {"scale": 0.25}}


def test_every_method_has_a_grid_of_its_settings():
    assert set(rivals.GRIDS) == {method.name for method in all_methods()}
    for method, grid in rivals.GRIDS.items():
        declared = declared_settings(find_method(method).settings)
        for name, axis in grid.items():
            for value in axis.values:
                declared[name].check(value)
            numbers = [value for value in axis.values if not isinstance(value, str)]
            assert numbers == sorted(numbers)
