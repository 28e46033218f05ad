"""A LoRA extracted from a fine-tune: nearer to it than the base; and refused inputs."""

import copy
import json

import pytest
import torch
from command_line import QUICK
from tiny import make_pipeline, random_lora

from iteris_core import Calibration, IterisError, write_lora
from iteris_core.edit.extract import differences, extract_lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.diffusers_lora import base_of
from iteris_core.lora_files import ReadOptions, read_lora_file
from iteris_core.solve.ranks import Target

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
    assert list(found.lora.vectors) == ["unet.conv_norm_out.weight"]
    assert found.left == ()


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


def with_norms_and_biases(pipeline, host):
    """The pipeline with a change of rank 2 on attention layers, and on every norm and bias."""
    other = copy.deepcopy(pipeline)
    sites = DiffusersHost(other).sites()
    for site, change in random_lora(host, 7, rank=2, size=0.4).sites.items():
        sites[site].weight.data += change.dense().reshape(sites[site].weight.shape)
    torch.manual_seed(6)
    for model in (other.unet, other.text_encoder):
        for value in model.parameters():
            if value.ndim == 1:
                value.data += 0.05 * torch.randn_like(value)
    return other


def parameters(pipeline):
    return {
        f"{name}.{key}": value
        for name in ("unet", "text_encoder")
        for key, value in getattr(pipeline, name).named_parameters()
    }


def test_norms_and_biases_are_in_the_file_in_full(pipeline, host, tmp_path):
    """A fine-tune of rank 2 with all vectors changed: file and base together are the fine-tune."""
    other = with_norms_and_biases(pipeline, host)
    kind = base_of(pipeline, host.sites())
    before = {name: value.clone() for name, value in parameters(pipeline).items()}
    found = extract_lora(host, DiffusersHost(other), Target(rank=8), kind, calibration=SHORT)
    assert found.left == ()
    assert found.error < 1e-3
    path = write_lora(found.lora, tmp_path / "whole.safetensors", dtype="float32")
    with pytest.raises(IterisError, match="a change of a"):
        read_lora_file(path, kind)
    lora = read_lora_file(path, kind, options=ReadOptions(vectors=True))
    ours = copy.deepcopy(pipeline)
    sites, values = DiffusersHost(ours).sites(), parameters(ours)
    for site, change in lora.sites.items():
        sites[site].weight.data += change.dense().reshape(sites[site].weight.shape)
    for name, vector in lora.vectors.items():
        values[name.replace(".text_model", "") if name not in values else name].data += vector
    for name, value in parameters(other).items():
        assert torch.allclose(values[name], value, atol=2e-5), name
    assert all(torch.equal(value, before[name]) for name, value in parameters(pipeline).items())


def test_a_layout_without_a_place_for_norms_says_which_are_left(pipeline, host, tmp_path):
    other = with_norms_and_biases(pipeline, host)
    kind = base_of(pipeline, host.sites())
    tuned = DiffusersHost(other)
    size = Target(rank=8)
    found = extract_lora(host, tuned, size, kind, layout="peft", calibration=SHORT)
    whole = extract_lora(host, tuned, size, kind, calibration=SHORT)
    assert found.lora.vectors == {}
    assert set(found.left) == set(whole.lora.vectors)
    assert whole.error < 0.1 * found.error
    assert "normalisations" in found.summary()
    assert f"{len(found.left)} differing parameters have no place in the file" in found.summary()
    pipeline.load_lora_weights(
        str(write_lora(found.lora, tmp_path / "p.safetensors", layout="peft"))
    )
    with pytest.raises(IterisError, match="have no place in this layout, such as"):
        write_lora(whole.lora, tmp_path / "no.safetensors", layout="peft")


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
    assert (told["exact"], told["left"]) == (["unet.conv_norm_out.weight"], [])
    wider = make_pipeline()
    config = {**wider.unet.config, "in_channels": 5, "_use_default_values": []}
    wider.unet = type(wider.unet).from_config(config)
    wider.save_pretrained(tmp_path / "wider")
    err = iteris.refused("extract", tmp_path / "base", tmp_path / "wider",
                       "-o", tmp_path / "no.safetensors", "--rank", 4)  # fmt: skip
    assert "have different architectures: unet.conv_in" in err
