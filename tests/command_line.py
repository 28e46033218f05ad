"""Run ``iteris …`` in this process, on a small world of files."""

import json
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import make_pipeline, random_lora

from iteris_core import cli, write_lora
from iteris_core.hosts.diffusers import DiffusersHost

QUICK = ("--samples=3", "--timesteps=1", "--latents=noise", "--device=cpu")


class Iteris:
    """``iteris …``: what it prints where it ends well."""

    def __init__(self, monkeypatch, capsys) -> None:
        self._monkeypatch, self._capsys, self.err = monkeypatch, capsys, ""

    def run(self, *arguments) -> tuple[int, str, str]:
        """(exit status, stdout, stderr on one line)"""
        self._monkeypatch.setattr(sys, "argv", ["iteris", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = self._capsys.readouterr()
        self.err = " ".join(err.split())
        return int(stop.value.code or 0), out, self.err

    def __call__(self, *arguments) -> str:
        code, out, err = self.run(*arguments)
        assert code == 0, err
        return out

    def refused(self, *arguments) -> str:
        """The error, where a user has made a mistake."""
        code, _, err = self.run(*arguments)
        assert code == 2, err
        return err


def recipe_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["iteris"])


def same(one, two) -> bool:
    """Whether two files have the same tensors."""
    first, second = load_file(one), load_file(two)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def make_world(folder):
    """``base``, ``lora1.safetensors`` and ``lora2.safetensors``, each under 100 kB."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "base")
    host = DiffusersHost(pipeline)
    for seed in (1, 2):
        write_lora(random_lora(host, seed), folder / f"lora{seed}.safetensors")
    return folder


def make_dino(folder):
    """A tiny DINOv2 and what prepares its pictures."""
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
