"""Run ``iteris …`` in this process, on a small world of files."""

from __future__ import annotations

import json
import sys

import pytest
from safetensors import safe_open
from tiny import make_pipeline, random_lora

from iteris_core import cli, write_lora
from iteris_core.hosts.diffusers import DiffusersHost

QUICK = ("--samples=3", "--timesteps=1", "--latents=noise", "--device=cpu")


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """(exit status, stdout, stderr on one line) of ``iteris …``"""
    monkeypatch.setattr(sys, "argv", ["iteris", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, " ".join(err.split())


def recipe_of(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["iteris"])


def make_world(folder):
    """``base``, ``lora1.safetensors`` and ``lora2.safetensors``, each under 100 kB."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(folder / "base")
    host = DiffusersHost(pipeline)
    for seed in (1, 2):
        write_lora(random_lora(host, seed), folder / f"lora{seed}.safetensors")
    return folder
