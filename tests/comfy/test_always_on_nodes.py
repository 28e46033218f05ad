"""Speed LoRAs that are always on: as if Load LoRA had put them on MODEL and CLIP."""

from dataclasses import replace

import torch
from safetensors.torch import load_file, save_file


def speedy(kit):
    """A LoRA of the layers of a with other numbers."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        key: t if key.endswith("alpha") else torch.randn(t.shape, generator=generator) * t.std()
        for key, t in load_file(kit.loras / "a.safetensors").items()
    }
    save_file(tensors, kit.loras / "turbo.safetensors")
    return kit.loras / "turbo.safetensors"


def test_it_is_as_if_load_lora_had_put_it_there(kit):
    path = speedy(kit)
    kit.calibration = replace(kit.calibration, conditions=0.0)
    speed = kit.specs.make_spec(path, strength=0.5, kind="always on")
    ours = kit.merge(concepts=[*kit.concepts(), speed]).lora.sites
    wanted = kit.merge(on=kit.stock(path, 0.5)).lora.sites
    own = kit.lora.ComfySites(kit.model, kit.clip).read_lora(path)
    assert ours.keys() == wanted.keys()
    for site, change in wanted.items():
        there = change.dense()
        if site in own.sites:
            there = there + 0.5 * own.sites[site].dense().to(there.dtype)
        assert float((ours[site].dense() - there).norm() / there.norm()) < 1e-3, site
