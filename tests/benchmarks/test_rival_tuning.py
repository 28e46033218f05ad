"""The search for a rival's settings, on made-up scores."""

from __future__ import annotations

import pytest
from search_settings import GRIDS, tuned

from iteris_core.methods import find_method
from iteris_core.settings import declared_settings


def test_each_is_measured_once_and_the_best_is_taken():
    asked = []

    def score(settings):
        assert settings not in asked
        asked.append(dict(settings))
        return -abs(settings["scale"] - 0.56)

    assert tuned("task-arithmetic", score) == {"scale": 0.55}
    assert len(asked) == len(GRIDS["task-arithmetic"]["scale"])


def test_settings_that_go_together_are_found_together():
    """A ridge across the grid: the best of each alone is not the best of both."""

    def score(settings):
        density, scale = settings["density"], settings["scale"]
        return -((density + scale - 1.6) ** 2) * 9 - (density - scale + 0.1) ** 2

    best = tuned("ties", score)
    around = [{**best, name: value} for name in best for value in GRIDS["ties"][name]]
    assert all(score(best) >= score(other) for other in around)


def test_words_are_tried_and_what_a_method_refuses_is_not():
    def score(settings):
        assert settings["density"] + settings["window"] / 2 <= 1
        return settings["density"] + settings["window"] - settings["scale"]

    best = tuned("della", score)
    assert best["density"] == 0.9
    assert best["scale"] == min(GRIDS["della"]["scale"])
    assert tuned("wudi", lambda settings: settings["solution"] == "closed")["solution"] == "closed"


@pytest.mark.parametrize("method", GRIDS)
def test_a_grid_is_of_the_method_s_settings(method):
    declared = declared_settings(find_method(method).settings)
    for name, values in GRIDS[method].items():
        for value in values:
            declared[name].check(value)
        numbers = [value for value in values if not isinstance(value, str)]
        assert numbers == sorted(numbers)
