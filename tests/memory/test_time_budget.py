"""Samples by a time budget."""

import pytest
from bases import make_lora, tiny

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.calibration import LEAST_SAMPLES
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes.job import Job, within_time
from iteris_core.preview import preview_merge

pytestmark = pytest.mark.usefixtures("unmeasured")


def test_if_forwards_are_unknown_all_samples_stay():
    unknown = Job(None, [], {}, Calibration(minutes=0.01), None, lambda *_: None)
    assert within_time(unknown, 1).calibration.samples == 80


def test_a_merge_in_no_time_has_twelve_samples_and_says_so():
    host = DiffusersHost(tiny("sd1"))
    site = next(site for site in host.sites() if site.endswith("attn1.to_q"))
    concepts = [
        Concept(make_lora("sd1", (site,), n), trigger=f"s{n}", class_word="dog") for n in (0, 1)
    ]
    given = {"timesteps": 1, "denoising_steps": 1, "generic": 0.0, "latent_size": 8}
    short = {**given, "samples": 14, "minutes": 1e-6}
    result = merge_loras(host, concepts, calibration=short)
    assert result.report.rows == 2 * LEAST_SAMPLES
    assert result.report.notes["samples"] == [
        "12 of 14 prompts per concept, for a merge of about 1e-06 min"
    ]
    kept = result.report.calibration
    assert (kept["samples"], kept["minutes"]) == (LEAST_SAMPLES, None)
    assert "24 rows" in preview_merge(host, concepts, calibration=short).plan[-1]
    # As with so many samples asked for, generic prompts included.
    generic = {**given, "generic": 0.2}
    result, again = (
        merge_loras(host, concepts, calibration={**generic, **more})
        for more in ({"samples": 40, "minutes": 1e-6}, {"samples": LEAST_SAMPLES})
    )
    assert again.lora.sites[site].dense().equal(result.lora.sites[site].dense())
    assert result.report.notes["generic"] == again.report.notes["generic"]
    assert "samples" not in again.report.notes
    long = merge_loras(host, concepts, calibration={**given, "samples": 14, "minutes": 60.0})
    assert long.report.rows == 2 * 14
