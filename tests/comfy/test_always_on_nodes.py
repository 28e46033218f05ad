"""Speed LoRAs that are always on: as if Load LoRA had put them on MODEL and CLIP."""

from dataclasses import replace

import pytest
import torch
from kit import SETTINGS, use_folders


def test_it_is_as_if_load_lora_had_put_it_there(kit):
    path = kit.loras / "c.safetensors"
    kit.calibration = replace(kit.calibration, conditions=0.0)
    speed = kit.specs.make_spec(path, strength=0.5, kind="always on")
    step = {"steps": 1}  # more of them enlarge differences by rounding
    ours = kit.merge(step, concepts=[*kit.concepts(), speed]).lora.sites
    wanted = kit.merge(step, on=kit.stock(path, 0.5)).lora.sites
    own = kit.lora.ComfySites(kit.model, kit.clip).read_lora(path)
    assert ours.keys() == wanted.keys()
    for site, change in wanted.items():
        there = change.dense()
        if site in own.sites:
            there = there + 0.5 * own.sites[site].dense().to(there.dtype)
        assert float((ours[site].dense() - there).norm() / there.norm()) < 1e-3, site


def test_two_bare_files_are_no_merge_but_the_method_sum_adds_them_up(kit, monkeypatch):
    """As a LORA_STACK brings them: MODEL and CLIP are as with Load LoRA."""
    use_folders(monkeypatch, kit.folder, "loras")
    merge = kit.node("merge_nodes", "IterisMerge")
    stack = [("b.safetensors", 0.7, 0.7), ("c.safetensors", 0.5, 0.5)]
    given = {"settings": SETTINGS, "samples": 2}
    with pytest.raises(kit.core.IterisError, match="only be added up"):
        merge.execute(kit.model, stack, kit.clip, **given)
    made = merge.execute(kit.model, stack, kit.clip, method="sum", **given).result
    drawn = kit.draw(*made[:2])
    kit.model, kit.clip = kit.stock("b.safetensors", 0.7)
    wanted = kit.draw(*kit.stock("c.safetensors", 0.5))
    torch.testing.assert_close(drawn, wanted, rtol=1e-2, atol=1e-2)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(drawn, kit.draw(kit.model, kit.clip), rtol=1e-2, atol=1e-2)


def test_a_lora_that_is_on_model_already_is_refused(kit):
    """By Load LoRA, on MODEL or on CLIP alone; another one there counts as the base."""
    model, clip = kit.stock("a.safetensors", 0.5)
    for on in ((model, clip), (model, kit.clip), (kit.model, clip)):
        with pytest.raises(kit.core.IterisError, match=r"a\.safetensors is on this MODEL or CLIP"):
            kit.merge(on=on)
    assert kit.merge(on=kit.stock("c.safetensors", 0.5)).report.loras == 2
