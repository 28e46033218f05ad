"""Inspect shows what fits, what is alike and a merge's plan, and merges nothing."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import pytest
import torch
from kit import Kit
from safetensors.torch import load_file, save_file

SETTINGS = {"image_size": 64, "timesteps": 2, "denoising_steps": 4, "memory": 1.0}


@pytest.fixture
def inspect(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Any:
    node = importlib.import_module(kit.merging.__name__.replace("merging", "inspect_node"))
    hidden = type("Hidden", (), {"unique_id": None, "prompt": None})
    monkeypatch.setattr(node.InspectLoras, "hidden", hidden, raising=False)

    def run(*specs: Any, **values: Any) -> str:
        given = {"clip": kit.clip, "samples": 4, "settings": SETTINGS, **values}
        plot, table = node.InspectLoras.execute(kit.model, specs, **given).result
        assert plot.ndim == 4
        return table

    return run


def test_one_lora(kit: Kit, inspect: Any) -> None:
    table = inspect(kit.concepts()[0])
    assert table.splitlines()[1].split()[:3] == ["sks", "34", "4"]
    assert "Plan: text encoder clip_l: " in table
    assert "Plan: denoiser: 8 rows" in table
    assert "16 forwards of one row" in table  # 4 samples in 4 steps
    assert kit.hooks() == 0


def test_the_plan_is_the_merge_s(kit: Kit, inspect: Any) -> None:
    table = inspect(*kit.concepts(), clip=kit.clip)
    settings = {"precision": "float32"}
    result = kit.merge(settings, memory_budget=2**30)
    assert result.report.plan
    for line in result.report.plan:
        stage, _, rows = line.partition(": ")
        assert f"Plan: {stage}: {rows.split()[0]} rows" in table
    kit.outputs()
    assert kit.hooks() == 0


def test_what_does_not_fit_and_what_is_alike(kit: Kit, inspect: Any) -> None:
    tensors = load_file(kit.loras / "a.safetensors")
    save_file(tensors | {"lora_unet_elsewhere.diff": torch.ones(3)}, kit.loras / "more.safetensors")
    make = kit.specs.make_spec
    more = make(kit.loras / "more.safetensors", trigger="tok")
    table = inspect(kit.concepts()[0], more)
    assert "tok: left out:" in table
    assert "lora_unet_elsewhere" in table
    assert "sks and tok are ALIKE (100%)" in table
    assert "ALIKE" not in inspect(*kit.concepts())


def test_what_would_stop_a_merge(kit: Kit, inspect: Any) -> None:
    mute = dataclasses.replace(kit.concepts()[0], trigger="", class_word="")
    table = inspect(mute)
    assert "no trigger words and no prompts" in table
    table = inspect(kit.concepts()[0], settings={**SETTINGS, "memory": 1e-6})
    assert "A merge would fail: " in table
    table = inspect(*kit.concepts(), method="ties")
    assert "Plan: ties looks at weights only" in table
    with pytest.raises(kit.core.IterisError, match="No LoRA is connected"):
        inspect()
