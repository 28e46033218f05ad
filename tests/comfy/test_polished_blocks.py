"""ComfyUI's models polished block by block: their weights were loaded in inference mode."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from figures import Trial
from kit import Kit, merge_on
from reduced_models import ARCHITECTURES

FAST = ("SD 1.5", "FLUX.1", "Z-Image")
NAMES = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name, reduced in ARCHITECTURES.items()
    if not reduced.experts and name != "Chroma Radiance"
]
"""Of Chroma Radiance's reduced blocks, all random, none gains in so few steps."""


@pytest.mark.parametrize("name", NAMES)
def test_blocks_are_found_and_polished(
    pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    reduced = ARCHITECTURES[name]
    polish = importlib.import_module(f"{pack.__name__}.iteris_core.methods.block_polish")
    trial = Trial(pack, reduced, tmp_path)
    polished: list[bool] = []
    whole = polish._StagePolish._polish

    def noted(*asked: object) -> bool:
        gained = whole(*asked)
        polished.append(gained)
        return gained

    monkeypatch.setattr(polish._StagePolish, "_polish", noted)
    with torch.inference_mode():
        plain = trial.merge(2).lora.sites
        result = trial.merge(2, block_steps=15)
    found = result.lora.sites
    moved = [site for site, change in plain.items() if not torch.equal(change.up, found[site].up)]
    why = str(result.report.notes.get("sites", ""))
    assert "cannot be differentiated" not in why
    assert any(polished) or "a different result when run by themselves" in why
    assert bool(moved) == any(polished)
    assert all(bool(change.up.isfinite().all()) for change in found.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trial.model.model.modules())


def test_fused_operations_have_gradients_while_blocks_are_polished(pack: ModuleType) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    training = importlib.import_module(f"{pack.__name__}.nodes.comfy_state").training
    angles = torch.randn(1, 1, 8, 8)
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    x = torch.randn(1, 2, 8, 16, requires_grad=True)
    fused = kitchen.apply_rope1(x.detach(), turns)
    with training():
        plain, _ = kitchen.apply_rope(x, x, turns)
    assert torch.allclose(plain, fused, atol=1e-5)
    plain.square().sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, 2 * x, atol=1e-4)  # a turn keeps lengths


def test_the_model_is_as_it_was(kit: Kit) -> None:
    before = kit.outputs()
    settings = {"block_steps": 3}
    with torch.inference_mode():
        result = merge_on(
            kit.merging, kit.model, kit.clip, kit.concepts(), "iteris", settings, kit.calibration
        )
    assert result.lora.sites
    assert kit.hooks() == 0
    assert all(torch.equal(a, b) for a, b in zip(kit.outputs(), before, strict=True))


def test_pictures_of_two_concepts_are_polished_on(
    pack: ModuleType, kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = importlib.import_module(f"{pack.__name__}.iteris_core.methods.side_by_side")
    whole = shown.SideBySide.passages
    seen: list[list[tuple[int, ...]]] = []

    def noted(*asked: object) -> object:
        found = list(whole(*asked))
        seen.append([tuple(owners) for passage in found for owners in passage.owners])
        return found

    monkeypatch.setattr(shown.SideBySide, "passages", noted)
    before = kit.outputs()
    with torch.inference_mode():
        both, alone = (
            kit.merge({"block_steps": 3, "block_pairs": pairs}).lora.sites for pairs in (0.5, 0.0)
        )
    assert seen
    assert all(set(owners) == {(0, 1), (1, 0)} for owners in seen)
    assert any(not torch.equal(change.up, alone[site].up) for site, change in both.items())
    assert kit.hooks() == 0
    assert all(torch.equal(a, b) for a, b in zip(kit.outputs(), before, strict=True))
