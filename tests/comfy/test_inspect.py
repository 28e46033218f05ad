"""Inspect shows what fits, what is alike and a merge's plan, and merges nothing."""

import pytest
import torch
from kit import SETTINGS
from safetensors.torch import load_file, save_file

WITH_MEMORY = {**SETTINGS, "memory": 1.0}


@pytest.fixture
def inspect(kit):
    def run(*specs, **values):
        """As ComfyUI runs it."""
        given = {"clip": kit.clip, "samples": 4, "settings": WITH_MEMORY, **values}
        with torch.inference_mode():
            plot, table = (
                kit.node("edit_nodes", "InspectLoras").execute(kit.model, specs, **given).result
            )
        assert plot.ndim == 4
        return table

    return run


def test_the_plan_is_the_merge_s(kit, inspect):
    before = kit.outputs()
    table = inspect(*kit.concepts())
    assert table.splitlines()[1].split()[:3] == ["sks", "34", "4"]
    plans = kit.merge({"precision": "float32"}, memory_budget=2**30).report.plan
    assert len(plans) == 2
    for line in plans:
        stage, _, rows = line.partition(": ")
        assert f"Plan: {stage}: {rows.split()[0]} rows" in table
    assert kit.unchanged(before)


def test_what_does_not_fit_and_what_is_alike(kit, inspect):
    tensors = load_file(kit.loras / "a.safetensors")
    save_file(tensors | {"lora_unet_elsewhere.diff": torch.ones(3)}, kit.loras / "more.safetensors")
    more = kit.specs.make_spec(kit.loras / "more.safetensors", trigger="tok")
    table = inspect(kit.concepts()[0], more)
    assert "tok: left out:" in table
    assert "lora_unet_elsewhere" in table
    assert "sks and tok are ALIKE (100%)" in table
    assert "ALIKE" not in inspect(*kit.concepts())


def test_what_would_stop_a_merge(kit, inspect):
    mute = kit.concepts()[0].model_copy(update={"trigger": "", "class_word": ""})
    assert "no trigger words and no prompts" in inspect(mute)
    table = inspect(kit.concepts()[0], settings={**SETTINGS, "memory": 1e-6})
    assert "A merge would fail: " in table
    assert "Plan: ties looks at weights only" in inspect(*kit.concepts(), method="ties")
    with pytest.raises(kit.core.IterisError, match="No LoRA is connected"):
        inspect()
