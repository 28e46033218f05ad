"""Polish: the final output gets closer to each LoRA's own, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from bases import make_sdxl
from oracle import ModuleHost, Net, changed, dense_changes, make_data, make_lora
from pipelines import PIPELINES, two_concepts
from tiny import random_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.methods.polish import _FinalOutputs
from iteris_core.passes.changes import changes_of
from iteris_core.passes.job import Job


def final_error(lora, loras, data):
    error = 0.0
    with torch.no_grad():
        for one, x in zip(loras, data, strict=True):
            wanted = changed(Net(), dense_changes(one))(x)
            base = Net()(x)
            found = changed(Net(), dense_changes(lora))(x)
            error += float((found - wanted).norm() ** 2 / (wanted - base).norm() ** 2)
    return error


def test_polish_lowers_the_final_error_and_keeps_the_base():
    loras, data, model = [make_lora(1), make_lora(2)], make_data(2, rows=24), Net()
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, polished = (
        merge_loras(
            ModuleHost(model, data), concepts, settings={"polish_steps": steps, "polish_rate": 2e-3}
        )
        for steps in (0, 150)
    )
    assert final_error(polished.lora, loras, data) < 0.9 * final_error(plain.lora, loras, data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())
    assert all(not c.up.requires_grad for c in polished.lora.sites.values())


def test_polish_never_ends_worse_than_it_began_on_held_out_rows():
    loras, data = [make_lora(1), make_lora(2)], make_data(2, rows=24)
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    plain, wild = (
        merge_loras(
            ModuleHost(Net(), data), concepts, settings={"polish_steps": s, "polish_rate": 50.0}
        )
        for s in (0, 25)
    )
    for site, change in plain.lora.sites.items():
        assert torch.allclose(change.dense(), wild.lora.sites[site].dense(), rtol=1e-5, atol=1e-6)


def test_polish_through_text_encoder_and_denoiser_can_be_cancelled(host):
    concepts = [Concept(random_lora(host, s), prompts=["a dog", "a cat"]) for s in (1, 2)]
    calibration = Calibration(samples=4, timesteps=2, latents="noise")
    result = merge_loras(
        host, concepts, settings={"polish_steps": 3, "micro_batch": 4}, calibration=calibration
    )
    assert any(site.startswith("text_encoder") for site in result.lora.sites)
    seen = []

    def on_progress(progress):
        seen.append(progress.what)
        if seen.count("polishing") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_loras(
            host,
            concepts,
            settings={"polish_steps": 100, "micro_batch": 4},
            calibration=calibration,
            on_progress=on_progress,
        )
    assert all(p.grad is None for p in host.pipeline.unet.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Z-Image", "Wan 2.2 with two experts"])
def test_polish_on_rows_of_unlike_kinds(name, tmp_path):
    """Texts of several lengths in lists, and two denoisers, each with its own rows."""
    host, concepts = two_concepts(PIPELINES[name](), tmp_path)
    changes = changes_of(concepts)
    calibration = Calibration(samples=6, timesteps=2, denoising_steps=3)
    job = Job(host, concepts, changes, calibration, torch.Generator(), lambda *_: None)
    with job.run() as run, torch.no_grad():
        stages = _FinalOutputs(run)
        assert len(stages.owners) == 24
        assert len(set(stages.kinds)) > 1
        rows = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
        together = stages.outputs(rows, merged=False)
        alone = torch.cat([stages.outputs([row], merged=False) for row in rows])
        base = stages.outputs(rows, merged=True)
    assert float((together - alone).norm()) < 1e-4 * float((together - base).norm())


def of_steps(host, lora, **settings):
    concepts = [Concept(lora(seed), prompts=["a dog", "a cat"]) for seed in (1, 2)]
    calibration = Calibration(
        samples=4, timesteps=2, denoising_steps=2, latents="noise", contexts=0.0, generic=0.0
    )
    return merge_loras(host, concepts, settings=settings, calibration=calibration)


def test_polish_where_a_text_encoders_last_layer_reaches_nothing():
    host = DiffusersHost(make_sdxl())
    plain, polished = (
        of_steps(host, lambda seed: random_lora(host, seed), polish_steps=steps) for steps in (0, 3)
    )
    moved = {
        site
        for site, change in plain.lora.sites.items()
        if not torch.equal(change.dense(), polished.lora.sites[site].dense())
    }
    assert any(site.startswith("unet.") for site in moved)
    assert any(site.startswith("text_encoder.") for site in moved)
    assert not any(".layers.1." in site for site in moved if site.startswith("text_encoder."))


def test_polish_of_keys_and_values_alone_does_nothing_and_says_so(host):
    def lora(seed):
        return random_lora(host, seed, select=lambda s: s.endswith(("attn2.to_k", "attn2.to_v")))

    plain, polished = (of_steps(host, lora, polish_steps=s, repair=False) for s in (0, 3))
    for site, change in plain.lora.sites.items():
        assert torch.equal(change.up, polished.lora.sites[site].up)
    assert "polish_steps do nothing" in str(polished.report.notes)


@pytest.mark.parametrize("settings", [{"polish_steps": 3}, {"block_steps": 3, "block_pairs": 0.0}])
def test_gradient_checkpointing_changes_nothing(pipeline, settings):
    def lora(seed):
        return random_lora(DiffusersHost(pipeline), seed)

    plain = of_steps(DiffusersHost(pipeline), lora, **settings)
    pipeline.unet.enable_gradient_checkpointing()
    found = of_steps(DiffusersHost(pipeline), lora, **settings)
    assert pipeline.unet.is_gradient_checkpointing
    assert found.report.notes == plain.report.notes
    for site, change in plain.lora.sites.items():
        assert torch.equal(change.up, found.lora.sites[site].up), site
