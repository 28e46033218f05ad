"""LoRAs of a model with two denoisers: one file for high noise and one for low, in and out."""

import json
import sys

import pytest
import torch
from pipelines import PIPELINES, draw, lora_tensors
from safetensors.torch import load_file, save_file

from iteris_core.cli import main
from iteris_core.errors import IterisError
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.lora_files.experts import expert_files, joined_experts, split_experts

WAN = "Wan 2.2 with two experts"
SETTINGS = ("denoising_steps=3", "samples=3", "timesteps=3", "latent_size=4", "frames=5")
CALIBRATION = [part for setting in SETTINGS for part in ("--set", setting)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A pipeline in a folder, and two concepts' files for high and for low noise."""
    folder = tmp_path_factory.mktemp("experts")
    reduced = PIPELINES[WAN]()
    reduced.pipeline.save_pretrained(folder / "base")
    for concept in (1, 2):
        for seed, end in ((concept, "high"), (10 + concept, "low")):
            save_file(lora_tensors(reduced.pipeline, seed), folder / f"{concept}-{end}.safetensors")
    return folder, reduced


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["iteris", *map(str, arguments)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def pair(folder, concept):
    return f"{folder / f'{concept}-high.safetensors'}+{folder / f'{concept}-low.safetensors'}"


def test_joined_and_split_are_inverse(world):
    folder, reduced = world
    host = DiffusersHost(reduced.pipeline)
    high, low = (host.read_lora(folder / f"1-{end}.safetensors") for end in ("high", "low"))
    both = joined_experts(high, low, host.experts)
    assert len(both.sites) == len(high.sites) + len(low.sites)
    assert set(both.sites) <= set(host.sites())
    for part, whole in zip(split_experts(both, host.experts), (high, low), strict=True):
        assert part.sites == whole.sites


def test_high_and_low_in_and_two_files_out(world, tmp_path, monkeypatch, capsys):
    """One command; the merge of one pair draws what the loader draws with its two files."""
    folder, reduced = world
    out = tmp_path / "merged.safetensors"
    arguments = [
        "merge", folder / "base", "--concept", f"{pair(folder, 1)}:sks:cat", "-o", out,
        "--base-dtype", "float32", "--dtype", "float32", "--device", "cpu", *CALIBRATION, "--json",
    ]  # fmt: skip
    assert run(monkeypatch, *arguments) == 0
    files = expert_files(out)
    assert json.loads(capsys.readouterr().out)["paths"] == [str(file) for file in files]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    base = draw(reduced)
    drawn = [
        _drawn(reduced, *some)
        for some in (files, [folder / f"1-{end}.safetensors" for end in ("high", "low")])
    ]
    gap = (drawn[0] - drawn[1]).norm() / (drawn[1] - base).norm()
    assert float(gap) < 1e-3


def _drawn(reduced, high, low):
    reduced.pipeline.load_lora_weights(str(high))
    reduced.pipeline.load_lora_weights(str(low), load_into_transformer_2=True)
    try:
        return draw(reduced)
    finally:
        reduced.pipeline.unload_lora_weights()


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_two_concepts_and_again_from_the_file(world, tmp_path, monkeypatch):
    """Each expert's part is merged from rows that it ran; the recipe finds all four files."""
    folder, _reduced = world
    out, again = tmp_path / "merged.safetensors", tmp_path / "again.safetensors"
    concepts = [part for n in (1, 2) for part in ("--concept", f"{pair(folder, n)}:s{n}:cat")]
    how = ["--base-dtype", "float32", "--dtype", "float32", "--device", "cpu"]
    assert run(monkeypatch, "merge", folder / "base", *concepts, "-o", out, *how, *CALIBRATION) == 0
    high, low = (load_file(file) for file in expert_files(out))
    assert high.keys() == low.keys()
    assert any(not torch.equal(high[key], low[key]) for key in high)
    recipe = ["merge", folder / "base", "--from", expert_files(out)[0], "--loras", folder]
    assert run(monkeypatch, *recipe, "-o", again, *how) == 0
    for one, other in zip(expert_files(out), expert_files(again), strict=True):
        first, second = load_file(one), load_file(other)
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_base_with_one_denoiser_takes_one_file(world, tmp_path, monkeypatch, capsys):
    folder, _ = world
    reduced = PIPELINES["Wan"]()
    reduced.pipeline.save_pretrained(tmp_path / "base")
    arguments = ["merge", tmp_path / "base", "--concept", f"{pair(folder, 1)}:sks:cat"]
    assert run(monkeypatch, *arguments, "-o", tmp_path / "merged.safetensors") != 0
    assert "has one denoiser; give one file" in " ".join(capsys.readouterr().err.split())


def test_a_file_without_the_denoiser_is_refused(world):
    folder, reduced = world
    host = DiffusersHost(reduced.pipeline)
    lora = host.read_lora(folder / "1-high.safetensors")
    with pytest.raises(IterisError, match="changes nothing in the unet"):
        joined_experts(lora, lora, "unet")
