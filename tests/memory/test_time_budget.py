"""Samples by a time budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from bases import make_lora, tiny

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.merge import begun, prepared
from iteris_core.methods import find_method
from iteris_core.methods.regmean import RegMeanSettings
from iteris_core.passes import workload
from iteris_core.passes.batches import ExecutionConfig
from iteris_core.passes.job import Job
from iteris_core.passes.workload import LEAST, sites_work, within_time
from iteris_core.preview import preview_merge
from iteris_core.solve.choose import POLICY


def job(**values):
    found = Job(None, [], {}, Calibration(**values), None, lambda *_: None)
    found.eta.did(1.0, 1.0)
    return found


@pytest.mark.parametrize(
    ("minutes", "samples"),
    [(None, 50), (3.0, 50), (110 / 60, 50), (109 / 60, 49), (1.0, 25), (0.1, LEAST)],
)
def test_as_many_samples_as_fit(monkeypatch, minutes, samples):
    """Ten seconds, and two for each sample."""
    monkeypatch.setattr(workload, "denoising_work", lambda job: 10.0 + 2 * job.calibration.samples)
    assert within_time(job(minutes=minutes), 1).calibration.samples == samples


def test_if_forwards_are_unknown_all_samples_stay():
    unknown = Job(None, [], {}, Calibration(minutes=0.01), None, lambda *_: None)
    assert within_time(unknown, 1).calibration.samples == 50


def test_rows_of_more_phrases_than_samples_are_foreseen():
    host = DiffusersHost(tiny("sd1"))
    site = next(site for site in host.sites() if site.endswith("attn1.to_q"))
    concepts = [
        Concept(make_lora("sd1", (site,), 0), subjects=[f"s{n} cat" for n in range(6)]),
        Concept(make_lora("sd1", (site,), 1), trigger="zwx", class_word="dog"),
    ]
    calibration = Calibration(samples=3, timesteps=2, denoising_steps=2, latent_size=8)
    begun_job, _ = begun(host, concepts, find_method("iteris"), calibration, None, None, POLICY)
    job, *_ = prepared(begun_job, [], find_method("regmean"), RegMeanSettings(), "refuse")
    (seen,) = (seen for seen in job.seen if seen.stage.name == "unet")
    ((way, _),) = sites_work(job, replace(seen, sites={site: seen.sites[site]}), ExecutionConfig(1))
    rows = way / (2 * seen.sites[site].products)
    result = merge_loras(host, concepts, "regmean", calibration=calibration)
    assert rows == pytest.approx(result.report.rows, rel=0.1)
    assert job.denoised == 9 * 2


def test_a_merge_in_no_time_has_twelve_samples_and_says_so():
    host = DiffusersHost(tiny("sd1"))
    site = next(site for site in host.sites() if site.endswith("attn1.to_q"))
    concepts = [
        Concept(make_lora("sd1", (site,), n), trigger=f"s{n}", class_word="dog") for n in (0, 1)
    ]
    given = {"timesteps": 1, "denoising_steps": 1, "generic": 0.0, "latent_size": 8}
    short = {**given, "samples": 14, "minutes": 1e-6}
    result = merge_loras(host, concepts, calibration=short)
    assert result.report.rows == 2 * LEAST
    assert result.report.notes["samples"] == [
        "12 of 14 prompts per concept, for a merge of about 1e-06 min"
    ]
    kept = result.report.calibration
    assert (kept["samples"], kept["minutes"]) == (LEAST, None)
    assert "24 rows" in preview_merge(host, concepts, calibration=short).plan[-1]
    again = merge_loras(host, concepts, calibration={**given, "samples": LEAST})
    assert again.lora.sites[site].dense().equal(result.lora.sites[site].dense())
    assert "samples" not in again.report.notes
    generic = {**given, "generic": 0.2}
    result, again = (
        merge_loras(host, concepts, calibration={**generic, **more})
        for more in ({"samples": 40, "minutes": 1e-6}, {"samples": LEAST})
    )
    assert again.lora.sites[site].dense().equal(result.lora.sites[site].dense())
    assert result.report.notes["generic"] == again.report.notes["generic"]
    long = merge_loras(host, concepts, calibration={**given, "samples": 14, "minutes": 60.0})
    assert long.report.rows == 2 * 14
