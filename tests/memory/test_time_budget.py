"""Samples by a time budget."""

import re

import pytest
from bases import make_lora, tiny
from tiny import two_concepts

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.calibration import LEAST_SAMPLES
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes.job import Job
from iteris_core.passes.time_limit import within_time
from iteris_core.preview import preview_merge
from iteris_core.progress import Forecast

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
        "12 of 14 prompts per concept and 0 of 60 steps, for a merge of about 1e-06 min"
    ]
    kept = result.report.calibration
    assert (kept["samples"], kept["minutes"]) == (LEAST_SAMPLES, None)
    assert "24 rows" in preview_merge(host, concepts, calibration=short).plan[-1]
    # As with so many samples asked for, generic prompts included.
    generic = {**given, "generic": 0.2}
    result, again = (
        merge_loras(host, concepts, settings={"steps": 0}, calibration={**generic, **more})
        for more in ({"samples": 40, "minutes": 1e-6}, {"samples": LEAST_SAMPLES})
    )
    assert again.lora.sites[site].dense().equal(result.lora.sites[site].dense())
    assert result.report.notes["generic"] == again.report.notes["generic"]
    assert "samples" not in again.report.notes
    long = merge_loras(host, concepts, calibration={**given, "samples": 14, "minutes": 60.0})
    assert long.report.rows == 2 * 14


def test_time_is_shared_between_prompts_and_steps(host, monkeypatch):
    """With forwards that always take equally long."""
    monkeypatch.setattr(Forecast, "rate", 1e-6)
    given = {"timesteps": 1, "denoising_steps": 1, "samples": 40}

    def planned(steps, minutes=None):
        calibration = {**given, "minutes": minutes}
        how = {"settings": {"steps": steps}, "calibration": calibration}
        return preview_merge(host, two_concepts(host), **how)

    whole, closed = planned(40).seconds, planned(0).seconds
    assert closed < whole
    minutes = (closed + whole) / 2 / 60
    found = planned(40, minutes)
    assert 0.9 * 60 * minutes < found.seconds <= 1.05 * 60 * minutes
    (note,) = (note for note in found.notes if note.startswith("samples: "))
    counts = re.match(r"samples: (\d+) of 40 prompts per concept and (\d+) of 40 steps", note)
    samples, steps = map(int, counts.groups())
    assert 12 < samples < 40
    assert 0 < steps < 40


@pytest.mark.slow
def test_where_time_runs_out_fewer_steps_are_taken(host, monkeypatch):
    """As many as the rest of it allows by then; the recipe has that number."""
    monkeypatch.setattr(Forecast, "rate", 1e-9)
    given = {"timesteps": 1, "denoising_steps": 1, "samples": 12, "minutes": 1.0}
    how = {"settings": {"steps": 5}, "calibration": given}
    assert merge_loras(host, two_concepts(host), **how).report.settings["steps"] == 5
    monkeypatch.setattr(Forecast, "seconds", 61.0)
    report = merge_loras(host, two_concepts(host), **how).report
    assert report.settings["steps"] == 0
    assert report.notes["steps"] == ["none, because 1 min are over"]
