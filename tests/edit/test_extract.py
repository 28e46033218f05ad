"""A LoRA extracted from a fine-tune: nearer to it than the base; and refused inputs."""

import copy
import json

import pytest
import torch
from command_line import QUICK
from tiny import make_pipeline, random_lora

from iteris_core import Calibration, IterisError
from iteris_core.edit.extract import differences, extract_lora
from iteris_core.edit.target import Target
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.diffusers_lora import base_of
from iteris_core.passes.job import Job

SHORT = Calibration(samples=3, timesteps=1, latents="noise", latent_size=4)


@pytest.fixture
def tuned(pipeline, host):
    """The pipeline with a change of rank 4 on every attention layer, and a little on all others."""
    other = copy.deepcopy(pipeline)
    sites = DiffusersHost(other).sites()
    torch.manual_seed(5)
    for site, change in random_lora(host, 7, size=0.4).sites.items():
        sites[site].weight.data += change.dense().reshape(sites[site].weight.shape)
    for module in sites.values():
        module.weight.data += 1e-3 * torch.randn_like(module.weight)
    other.unet.conv_norm_out.weight.data += 0.1
    return other


def test_what_is_extracted_is_the_fine_tune(pipeline, host, tuned):
    other = DiffusersHost(tuned)
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    kind = base_of(pipeline, host.sites())
    errors = {}
    for rank in (2, 6):
        found = extract_lora(host, other, Target(rank=rank), kind, calibration=SHORT)
        errors[rank] = found.error
        dense = differences(host, other)
        assert found.ranks.keys() == dense.keys()
    assert errors[6] < errors[2] < 1
    assert errors[6] < 0.5
    assert all(torch.equal(v, before[k]) for k, v in pipeline.unet.state_dict().items())


def test_its_error_is_that_of_the_outputs(pipeline, host, tuned):
    """On inputs of our own, with the changes on the weights in the place of hooks."""
    found = extract_lora(host, DiffusersHost(tuned), Target(rank=4), calibration=SHORT)
    words = pipeline.tokenizer(["a dog in the snow"] * 3, return_tensors="pt").input_ids
    noise = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))

    def output(pipe):
        with torch.no_grad():
            states = pipe.text_encoder(words).last_hidden_state
            return pipe.unet(noise, torch.tensor([50, 500, 900]), states).sample

    wanted, base = output(tuned), output(pipeline)
    for site, change in found.lora.sites.items():
        weight = host.sites()[site].weight
        weight.data += change.dense().reshape(weight.shape)
    ours = output(pipeline)
    error = float((ours - wanted).norm() / (base - wanted).norm())
    assert error == pytest.approx(found.error, abs=0.15)


@pytest.mark.parametrize(
    ("error", "why"),
    [(RuntimeError("no kernel"), "no kernel"), (MemoryError(), "MemoryError"),
     (KeyboardInterrupt(), "stopped")],
)  # fmt: skip
def test_an_error_in_the_comparison_loses_nothing(pipeline, host, tuned, monkeypatch, error, why):
    other, rescued = DiffusersHost(tuned), []
    whole = extract_lora(host, other, Target(rank=4), calibration=SHORT)

    def broken(*_):
        raise error

    monkeypatch.setattr("iteris_core.edit.extract.error_of", broken)
    how = {"calibration": SHORT, "rescue": rescued.append}
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            extract_lora(host, other, Target(rank=4), **how)
        (found,) = rescued
    else:
        found = extract_lora(host, other, Target(rank=4), **how)
        assert not rescued
    for site, change in whole.lora.sites.items():
        assert torch.equal(change.up, found.lora.sites[site].up)
    assert f"not compared with the fine-tune: {why}." in found.summary()
    assert found.error is None
    assert found.to_dict()["uncompared"] == why


def test_the_comparison_is_in_the_plan(host, tuned, monkeypatch):
    """Its rows and its samples by the memory, its time in the time left."""
    sizes, seen = [], []
    other, samples = DiffusersHost(tuned), DiffusersHost.samples
    kept = Job.at_once

    def counted(self, request):
        if request.held_out:
            sizes.append(request.at_once)
        return samples(self, request)

    def one(job, most, *given, **how):
        return min(1, kept(job, most, *given, **how))

    monkeypatch.setattr(DiffusersHost, "samples", counted)
    monkeypatch.setattr(Job, "at_once", one)
    extract_lora(host, other, Target(rank=2), calibration=SHORT, on_progress=seen.append)
    assert sizes == [1]
    first = next(step for step in seen if step.total and step.left is not None)
    assert first.what != "held-out rows"
    last = [step for step in seen if step.what == "held-out rows"]
    assert [step.done for step in last] == [0, 1, 2, 3]
    assert last[0].left > last[-1].left == 0


def test_equal_models_and_other_architectures_are_refused(pipeline, host):
    with pytest.raises(IterisError, match="the same layer weights"):
        extract_lora(host, DiffusersHost(copy.deepcopy(pipeline)), Target(rank=2))
    other = copy.deepcopy(pipeline)
    other.unet.conv_out = torch.nn.Conv2d(32, 5, 3, padding=1)
    with pytest.raises(IterisError, match=r"unet\.conv_out is \(4, 32, 3, 3\) in the base"):
        extract_lora(host, DiffusersHost(other), Target(rank=2))


def test_the_command(pipeline, tuned, tmp_path, iteris):
    pipeline.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    out = tmp_path / "out.safetensors"
    text = iteris("extract", tmp_path / "base", tmp_path / "tuned",
                          "-o", out, "--rank", 4, "--json", *QUICK, "--latent-size=4")  # fmt: skip
    told = json.loads(text)
    assert told["error"] < 1
    wider = make_pipeline()
    config = {**wider.unet.config, "in_channels": 5, "_use_default_values": []}
    wider.unet = type(wider.unet).from_config(config)
    wider.save_pretrained(tmp_path / "wider")
    err = iteris.refused("extract", tmp_path / "base", tmp_path / "wider",
                       "-o", tmp_path / "no.safetensors", "--rank", 4)  # fmt: skip
    assert "have different architectures: unet.conv_in" in err
