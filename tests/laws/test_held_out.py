"""Held-out rows: a merged LoRA that is each LoRA keeps 1 of it, and nothing keeps 0."""

from dataclasses import replace

import pytest
import torch
from pipelines import PIPELINES, two_concepts
from tiny import two_concepts as two_of

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes.changes import changes_of
from iteris_core.passes.held_out import BESIDE, STRENGTHS, FinalOutputs, kept
from iteris_core.passes.job import Job

CALIBRATION = Calibration(samples=3, timesteps=2, denoising_steps=3)
USES = {*map("{:g}".format, STRENGTHS), BESIDE}


def job_of(host, concepts):
    changes = changes_of(concepts)
    return Job(host, concepts, changes, CALIBRATION, torch.Generator(), lambda *_: None)


def final_raises(monkeypatch, error):
    """Let final outputs raise ``error``; only held-out rows and steps ask for them."""

    def final(rows, copy):
        raise error

    with_final(monkeypatch, final)


def with_final(monkeypatch, final):
    """Let all stages with final outputs have these."""
    stages = DiffusersHost.stages

    def patched(self, samples, sites):
        for stage in stages(self, samples, sites):
            yield stage if stage.final is None else replace(stage, final=final)

    monkeypatch.setattr(DiffusersHost, "stages", patched)


def test_a_lora_keeps_all_of_itself_and_the_base_nothing(host):
    concepts = two_of(host)
    itself = dict(concepts[0].lora.sites)
    before = [parameter.clone() for parameter in host.pipeline.unet.parameters()]
    for merged, shares in ((itself, (1.0,)), ({}, (0.0,))):
        (found,) = kept(job_of(host, concepts[:1]), merged)
        assert found.keys() == USES
        for use, of_use in found.items():
            assert of_use == pytest.approx(shares, abs=1e-4), use
    both, neither = kept(job_of(host, concepts), itself, {})
    assert neither == {use: pytest.approx([0, 0], abs=1e-4) for use in USES}
    for first, second in both.values():
        assert first == pytest.approx(1.0, abs=1e-4)
        assert second < 0.9
    after = host.pipeline.unet.parameters()
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_a_merge_says_what_it_keeps_and_is_not_lost_where_it_cannot_be_measured(host, monkeypatch):
    concepts = two_of(host)
    result = merge_loras(host, concepts, calibration=CALIBRATION)
    report, metadata = result.report, result.lora.metadata
    if report.strengths is None:
        assert "strength_min" not in metadata
    else:
        assert (
            float(metadata["strength_min"]),
            float(metadata["strength_max"]),
        ) == report.strengths
        assert "strength from" in metadata["modelspec.usage_hint"]
    assert report.kept.keys() == USES
    assert all(len(shares) == 2 for shares in report.kept.values())
    assert report.to_dict()["kept"]["1"] == list(report.kept["1"])

    final_raises(monkeypatch, torch.OutOfMemoryError("out of memory"))
    result = merge_loras(host, concepts, calibration=CALIBRATION)
    assert not result.report.kept
    assert "not measured: Out of memory" in str(result.report.notes["held-out rows"])
    assert result.lora.sites


@pytest.mark.parametrize("error", [TypeError("a pipeline's"), KeyError("x"), AssertionError()])
def test_whatever_a_measurement_raises_the_merge_is_there(host, monkeypatch, error):
    final_raises(monkeypatch, error)
    result = merge_loras(host, two_of(host), calibration=CALIBRATION)
    (note,) = result.report.notes["held-out rows"]
    assert note == f"not measured: {str(error) or 'AssertionError'}"
    assert result.lora.sites


def test_a_host_without_final_outputs_merges_and_the_report_says_so(host, monkeypatch):
    with_final(monkeypatch, None)
    result = merge_loras(host, two_of(host), calibration=CALIBRATION)
    (note,) = result.report.notes["held-out rows"]
    assert note == "not measured: no stage of the host returns final outputs (Stage.final)."
    assert result.lora.sites


class Stopped(Exception):
    """By which an application cancels."""


@pytest.mark.parametrize("stop", ["on_progress", "application", "keyboard"])
def test_a_user_cancels_a_measurement_too(host, monkeypatch, stop):
    def on_progress(progress):
        if stop == "on_progress" and progress.what == "held-out rows":
            raise Stopped

    final_raises(monkeypatch, Stopped() if stop == "application" else KeyboardInterrupt())
    if stop == "application":
        monkeypatch.setattr(DiffusersHost, "interrupts", (Stopped,), raising=False)
    with pytest.raises((Stopped, KeyboardInterrupt)):
        merge_loras(host, two_of(host), calibration=CALIBRATION, on_progress=on_progress)


def test_a_concept_that_preserves_the_base_is_not_measured(host):
    concepts = [*two_of(host)[:1], Concept.preserve(["a cat"])]
    assert {len(shares) for shares in kept(job_of(host, concepts), {})[0].values()} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Z-Image", "Wan 2.2 with two experts"])
def test_rows_of_unlike_kinds(name, tmp_path):
    """Texts of several lengths in lists, and two denoisers, each with its own rows."""
    host, concepts = two_concepts(PIPELINES[name](), tmp_path)
    job = job_of(host, concepts)
    with job.run() as run, torch.no_grad():
        samples = run.samples
    final = FinalOutputs(host, samples)
    own = {site: some.by_concept[0] for site, some in job.changes.items() if some.by_concept[0]}
    together, base = final.under(own), final.under({})
    assert len(together) == 12
    assert final.under(own, [1]).keys() == {row.number for row in samples.rows if row.concept == 1}
    alone = replace(final, at_once=1).under(own)
    for row, output in together.items():
        assert float((output - alone[row]).norm()) < 1e-4 * float(alone[row].norm())
    assert any(not torch.equal(output, base[row]) for row, output in together.items())
