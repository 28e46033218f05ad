"""Speed LoRAs that are always on: as if Load LoRA had put them on MODEL and CLIP."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kit import Kit, merge_on
from safetensors.torch import load_file, save_file


def speedy(kit: Kit, tmp_path: Path) -> Path:
    """A LoRA of the layers of a with other numbers."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        key: t if key.endswith("alpha") else torch.randn(t.shape, generator=generator) * t.std()
        for key, t in load_file(kit.loras / "a.safetensors").items()
    }
    path = tmp_path / "turbo.safetensors"
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("method", ["iteris", "average"])
def test_it_is_as_if_load_lora_had_put_it_there(kit: Kit, tmp_path: Path, method: str) -> None:
    import comfy.sd

    path = speedy(kit, tmp_path)
    calibration = replace(kit.calibration, conditions=0.0)
    speed = kit.specs.make_spec(path, strength=0.5, kind="always on")

    def merged(model: object, clip: object, *more: object) -> dict[str, torch.Tensor]:
        kit.merging._RememberingHost._last = ()
        settings = {"precision": "float64"} if method == "iteris" else {}
        concepts = [*kit.concepts(), *more]
        result = merge_on(kit.merging, model, clip, concepts, method, settings, calibration)
        return {site: change.dense() for site, change in result.lora.sites.items()}

    ours = merged(kit.model, kit.clip, speed)
    on_it = comfy.sd.load_lora_for_models(kit.model, kit.clip, load_file(path), 0.5, 0.5)
    wanted = merged(*on_it)
    own = kit.lora.ComfySites(kit.model, kit.clip).read_lora(path)
    for site, change in own.sites.items():
        there = wanted.get(site, torch.zeros(change.shape))
        wanted[site] = there + 0.5 * change.dense().to(there.dtype)
    assert ours.keys() == wanted.keys()
    for site, change in wanted.items():
        assert float((ours[site] - change).norm() / change.norm()) < 1e-3, site


def test_the_node_reads_no_words_for_it(kit: Kit, tmp_path: Path) -> None:
    spec = kit.specs.make_spec(speedy(kit, tmp_path), kind="always on")
    assert spec.always_on == "include"
    assert not spec.phrases
    node = importlib.import_module(f"{kit.specs.__package__}.loras_node")
    assert node._line(spec) == "turbo at 1: always on, part of the merged LoRA"
    stacks = importlib.import_module(f"{kit.specs.__package__}.lora_stacks")
    named = stacks.with_words([*kit.concepts(), spec], "sks cat; zwx dog")
    assert [list(one.phrases) for one in named] == [["sks cat"], ["zwx dog"], []]
