"""What needs no MODEL: methods that look at weights alone, and information of LoRAs of any base."""

import pytest
import torch
from kit import part, use_folders
from reduced_models import write_lora


@pytest.fixture
def loras(kit, monkeypatch):
    """Two of SD 1.5's, and one of SDXL, of a layer that SD 1.5 lacks."""
    use_folders(monkeypatch, kit.folder, "loras")
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q"
    words = {"ss_sd_model_name": "/home/me/models/v1-5.safetensors", "modelspec.license": "MIT"}
    for seed, file in enumerate(("one", "two")):
        path = kit.loras / f"{file}.safetensors"
        write_lora(path, {name: (640, 640)}, seed, alpha=4.0, metadata=words)
    deep = "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k"
    write_lora(kit.loras / "large.safetensors", {deep: (1280, 2048)}, 3, alpha=4.0)
    node = kit.node("concept_nodes", "IterisLoras")

    def made(*names):
        rows = {f"lora_{row}": f"{name}.safetensors" for row, name in enumerate(names, 1)}
        words = {f"words_{row}": f"sks{row} cat" for row in range(1, len(names) + 1)}
        return node.execute(**rows, **words).result[0]

    return made


def test_methods_on_weights_merge_without_a_model(kit, loras):
    merge = kit.node("merge_nodes", "IterisMerge").execute
    merged = merge(concepts=loras("one", "two"), method="sum").result
    model, clip, lora, report, words, *_ = merged
    assert (model, clip, words) == (None, None, "sks1 cat, sks2 cat")
    (change,) = lora.lora.sites.values()
    read = part(kit.pack, "iteris_core.lora_files").read_for_released
    wanted = [
        next(iter(read(kit.loras / f"{n}.safetensors").sites.values())) for n in ("one", "two")
    ]
    torch.testing.assert_close(change.dense(), wanted[0].dense() + wanted[1].dense())
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_q.alpha" in lora
    assert "Merged 2 concepts with sum" in report
    with pytest.raises(kit.core.IterisError, match=r"iteris runs it.* weights alone: .*average"):
        merge(concepts=loras("one", "two"))
    with pytest.raises(kit.core.IterisError, match="SDXL"):
        merge(concepts=loras("one", "large"), method="average")


def test_a_lora_is_resized_by_its_weights_without_a_model(kit, loras):
    resize = kit.node("edit_nodes", "ResizeLora").execute
    how = {"target": "rank", "rank": 2}
    model, _, lora, _ = resize(concepts=loras("one"), by="weights", **how).result
    assert model is None
    assert lora.lora.ranks == {2}
    with pytest.raises(kit.core.IterisError, match="or set by to weights"):
        resize(concepts=loras("one"), **how)


def test_inspect_tells_of_loras_without_a_model(kit, loras):
    inspect = kit.node("inspect_node", "InspectLoras").execute
    plot, table = inspect(concepts=loras("one", "large")).result
    assert plot.ndim == 4
    (line,) = [line for line in table.splitlines() if line.startswith("one.safetensors (row 1): ")]
    assert line.partition(": ")[2] == (
        "for SD 1.x; LoRA; rank 4; alpha 4; 0.0 MiB; trained on v1-5.safetensors; words: sks1 cat "
        "(typed); prompts: subject; licence: MIT"
    )
    assert "large.safetensors (row 2): for SDXL" in table
    assert "Connect MODEL and CLIP to see the plan" in table


def test_inspect_goes_on_at_a_lora_of_another_base(kit, loras):
    inspect = kit.node("inspect_node", "InspectLoras").execute
    (large,) = loras("large")
    concepts = (*kit.concepts(), large)
    given = {"clip": kit.clip, "samples": 2, "settings": {"image_size": 64}}
    plot, table = inspect(kit.model, concepts, **given).result
    assert table.splitlines()[1].split()[:3] == ["sks", "34", "4"]
    assert "large.safetensors (row 1): for SDXL" in table
    assert "DOES NOT FIT: Row 1: large.safetensors" in table
    assert "A merge would fail: Row 1: large.safetensors" in table
    plot, table = inspect(kit.model, (large,), **given).result
    assert plot.ndim == 4
    assert "DOES NOT FIT: Row 1" in table
