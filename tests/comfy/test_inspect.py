"""Inspect shows what fits, what is alike and a merge's plan, and merges nothing."""

import re

import pytest
import torch
from kit import SETTINGS, part
from safetensors.torch import load_file, save_file

WITH_MEMORY = {**SETTINGS, "memory": 1.0}


@pytest.fixture
def inspect(kit):
    def run(*specs, **values):
        """As ComfyUI runs it."""
        given = {"clip": kit.clip, "samples": 4, "settings": WITH_MEMORY, **values}
        with torch.inference_mode():
            plot, table = (
                kit.node("inspect_node", "InspectLoras").execute(kit.model, specs, **given).result
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


def test_a_merge_says_what_it_takes_before_it_denoises(kit, inspect, monkeypatch):
    """And in its report, below the verdict."""
    shown: list[str] = []
    runtime = part(kit.pack, "nodes.comfy_runtime")
    monkeypatch.setattr(runtime, "show_text", lambda text, _: shown.append(text))
    given = {"clip": kit.clip, "samples": 20, "settings": WITH_MEMORY, "minutes": 1e-4}
    node = kit.node("merge_nodes", "IterisMerge")
    *_, report, _, _ = node.execute(kit.model, tuple(kit.concepts()), **given).result
    begun = next(at for at, text in enumerate(shown) if "enoising steps" in text)
    first, *_, last = shown[begun].splitlines()
    assert re.fullmatch(
        r"No row left out, rank at most 8, file at most .* MiB as float16", first
    ), "an estimate of the time that is not brought up to date contradicts the one that is"
    assert ", about " in last
    assert "12 of 20 prompts per concept" in shown[begun]
    lines = iter(report.splitlines())
    planned = next(line.strip() for line in lines if "Planned: " in line)
    assert re.fullmatch(rf"Planned: about .*, {first[0].lower()}{first[1:]}\.", planned)
    assert next(lines).startswith("Merged 2 concepts")
    table = inspect(*kit.concepts())
    (line,) = [line for line in table.splitlines() if line.startswith("Whole merge: ")]
    assert line.endswith(first.partition(", ")[2])
    assert line.startswith("Whole merge: about ")


def test_what_does_not_fit_and_what_is_alike(kit, inspect):
    tensors = load_file(kit.loras / "a.safetensors")
    save_file(tensors | {"lora_unet_elsewhere.diff": torch.ones(3)}, kit.loras / "more.safetensors")
    more = kit.specs.make_spec(kit.loras / "more.safetensors", trigger="tok")
    table = inspect(kit.concepts()[0], more)
    assert "tok: left out:" in table
    assert "lora_unet_elsewhere" in table
    assert "sks and tok are ALIKE (100%)" in table
    assert "ALIKE" not in inspect(*kit.concepts())


def test_a_plot_is_there_when_it_is_connected_later(kit):
    """ComfyUI hands on what a node made before the link was there."""
    node = kit.node("inspect_node", "InspectLoras")
    node.hidden.prompt = {"1": {"inputs": {}}}
    node.hidden.unique_id = None
    plot, _ = node.execute(kit.model, kit.concepts(), kit.clip, settings=SETTINGS).result
    assert plot.shape[0] == 1
    scored = part(kit.pack, "nodes.score_nodes")._score_output(torch.ones(2), "x", node.hidden)
    assert scored.result[3].shape[0] == 1


def test_what_would_stop_a_merge(kit, inspect):
    mute = kit.specs.make_spec(kit.loras / "b.safetensors")
    assert "no trigger words and no prompts" in inspect(mute)
    table = inspect(kit.concepts()[0], settings={**SETTINGS, "memory": 1e-6})
    assert "A merge would fail: " in table
    assert "Plan: ties looks at weights only" in inspect(*kit.concepts(), method="ties")
    with pytest.raises(kit.core.IterisError, match="No LoRA is connected"):
        inspect()
