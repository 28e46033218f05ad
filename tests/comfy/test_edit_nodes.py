"""Resize LoRA and Extract LoRA on a MODEL and CLIP, which stay as they were."""

import pytest
import torch
from kit import SETTINGS, distance, part
from safetensors.torch import load_file, save_file

SIZE = {"target": "rank", "rank": 2}


class Edits:
    """Both nodes, with ``progress`` called at every step."""

    def __init__(self, kit, monkeypatch):
        self.kit, self.progress = kit, lambda _: None
        nodes = part(kit.pack, "nodes.edit_nodes")
        monkeypatch.setattr(nodes.NodeProgress, "__call__", lambda _, p: self.progress(p))

    def run(self, name, *args, **values):
        values = {**SIZE, "samples": 4, "settings": SETTINGS, **values}
        return self.kit.node("edit_nodes", name).execute(*args, **values).result


@pytest.fixture
def edits(kit, monkeypatch):
    return Edits(kit, monkeypatch)


@pytest.mark.parametrize("by", ["outputs", "weights"])
def test_a_lora_of_a_lower_rank_than_it_says_is_resized_without_loss(kit, edits, by):
    tensors = load_file(kit.loras / "a.safetensors")
    for key, up in tensors.items():
        if key.endswith("lora_up.weight"):
            up[:, 2:] = up[:, :2]  # of four columns two are the others again
    save_file(tensors, kit.loras / "twice.safetensors")
    spec = kit.specs.make_spec(kit.loras / "twice.safetensors", trigger="sks", class_word="cat")
    before = kit.outputs()
    model, clip, lora, report = edits.run("ResizeLora", kit.model, [spec], kit.clip, by=by)
    assert lora.lora.ranks == {2}
    assert "100.0% of its effect on their outputs kept" in report
    host = kit.host.ComfyHost(kit.model, kit.clip)
    assert distance(lora.lora, kit.read_concept(spec, host).lora) < 1e-4
    wanted = kit.draw(*kit.stock("twice.safetensors"))
    effect = (kit.draw(kit.model, kit.clip) - wanted).norm()
    assert (kit.draw(model, clip) - wanted).norm() < 2e-3 * effect
    assert kit.unchanged(before)


def test_one_lora_and_one_target(kit, edits):
    on = kit.model, kit.concepts()[:1], kit.clip
    with pytest.raises(kit.core.IterisError, match="target is energy, but energy is 0"):
        edits.run("ResizeLora", *on, target="energy", energy=0.0)
    numbers = {"by": "weights", "rank": 2, "megabytes": 50.0, "energy": 0.9}
    ranks = edits.run("ResizeLora", *on, **numbers)[2].lora.ranks
    assert max(ranks) < 8
    assert edits.run("ResizeLora", *on, **{**numbers, "target": "energy"})[2].lora.ranks != ranks
    # A graph of an earlier version: the one that is not 0.
    old = {"target": None, "by": "weights", "rank": 0, "megabytes": 0.0, "energy": 0.9}
    found = edits.run("ResizeLora", *on, **old)[2].lora.ranks
    assert found == edits.run("ResizeLora", *on, **{**numbers, "target": "energy"})[2].lora.ranks
    with pytest.raises(kit.core.IterisError, match="takes one LoRA, but 2 are connected"):
        edits.run("ResizeLora", kit.model, kit.concepts(), kit.clip)


@pytest.mark.parametrize("parts", ["both", "MODEL", "CLIP"])
def test_a_lora_on_a_model_is_extracted_from_it(kit, edits, parts):
    """Both MODELs share one network, of which one has the LoRA on it."""
    model, clip = kit.stock("a.safetensors")
    tuned = (model if parts != "CLIP" else kit.model, clip if parts != "MODEL" else None)
    before = kit.outputs()
    target = kit.outputs(tuned[0], tuned[1] or kit.clip)
    *found, lora, report = edits.run("ExtractLora", kit.model, tuned[0], kit.clip, tuned[1], rank=4)
    host = kit.host.ComfyHost(kit.model, kit.clip)
    wanted = kit.read_concept(kit.concepts()[0], host).lora.sites
    roots = {"both": ("unet", "text"), "MODEL": ("unet",), "CLIP": ("text",)}[parts]
    assert set(lora.lora.sites) == {site for site in wanted if site.startswith(roots)}
    for site, change in lora.lora.sites.items():
        gap = (change.dense() - wanted[site].dense()).norm() / wanted[site].dense().norm()
        assert gap < 0.02, site
    assert "error 0." in report or "error 1." in report
    close = kit.draw(found[0], found[1] if tuned[1] else kit.clip)
    assert (close - target[1]).norm() < 0.02 * (before[1] - target[1]).norm()
    assert kit.unchanged(before)
    again = kit.outputs(tuned[0], tuned[1] or kit.clip)
    assert all(torch.equal(*pair) for pair in zip(again, target, strict=True))


def test_models_that_are_alike_or_of_two_kinds(kit, edits):
    from reduced_models import zimage

    # What nothing of SD 1.x uses, and ComfyUI leaves as the memory was.
    projection = kit.clip.cond_stage_model.clip_l.transformer.text_projection
    projection.weight.data.fill_(float("nan"))
    with pytest.raises(kit.core.IterisError, match="have the same layer weights"):
        edits.run("ExtractLora", kit.model, kit.model, kit.clip)
    with pytest.raises(kit.core.IterisError, match="have different architectures"):
        edits.run("ExtractLora", kit.model, zimage()[0], kit.clip)
