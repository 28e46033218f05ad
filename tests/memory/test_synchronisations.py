"""A graphics card runs ahead of the host until the host reads from it: how often a merge does."""

import pytest
from pretend_card import moved, pretend_card
from tiny import two_concepts

from iteris_core import merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.solve.choose import THRESHOLDS, Thresholds

WIDE = Thresholds(small_target=0, directions_gain=0.0)
"""Every site is solved in some directions of its outputs, as wide ones are."""


@pytest.mark.parametrize(
    ("thresholds", "each"), [(THRESHOLDS, 1), pytest.param(WIDE, 2, marks=pytest.mark.slow)]
)
def test_a_site_waits_once_and_once_more_to_find_directions(pipeline, thresholds, each):
    moved(pipeline.unet)
    moved(pipeline.text_encoder)
    host = DiffusersHost(pipeline)
    calibration = {"samples": 3, "timesteps": 2, "denoising_steps": 2, "latent_size": 8}
    with pretend_card() as waits:
        result = merge_loras(
            host,
            two_concepts(host),
            # With a bound, each time that the ridge grows; in steps, each row.
            settings={"bound": 0.0, "steps": 0},
            calibration=calibration,
            thresholds=thresholds,
            memory_budget=None,
        )

    def count(part):
        return sum(times for (_, place), times in waits.items() if part in place)

    sites = len(result.lora.sites)
    assert sites > 40
    assert count("solve/") == each * sites
    lists = 2 + 3 + 2  # of blocks: down, the lists within the middle one, up
    assert count("activations/streams") <= 4 * lists
    rest = {
        (what, place): times
        for (what, place), times in waits.items()
        if "solve/" not in place and "activations/streams" not in place
        if not place.startswith("hosts/")  # the pipeline's own, and samples that are kept
    }
    assert sum(rest.values()) <= 24, rest  # most are outputs of held-out rows
