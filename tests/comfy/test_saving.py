"""Save Merged LoRA: names, ranks, and a full disk."""

import json

import pytest
import torch
from kit import node, part, use_folders


@pytest.fixture
def save(pack, tmp_path, monkeypatch):
    use_folders(monkeypatch, tmp_path, "loras", "embeddings")
    return node(pack, "save_node", "SaveMergedLora").execute


def test_names_of_saved_files(pack, save, tmp_path):
    lora = {"lora_unet_a.lora_up.weight": torch.ones(3, 2)}
    prefixes = ("one", "folder/one", "one", "one.safetensors", "v1.5/two")
    names = [save(lora, prefix).result[0] for prefix in prefixes]
    assert names == ["one.safetensors", "folder/one.safetensors", "one_2.safetensors",
                     "one_3.safetensors", "v1.5/two.safetensors"]  # fmt: skip
    assert save(lora, "one", overwrite=True).result == ("one.safetensors",)
    before = sorted(tmp_path.rglob("*"))
    nameless = ("", " ", ".", "folder/", "folder/..")
    outside = ("..", "../other", "/tmp/other", "folder/../../other")
    for message, prefixes in (("no name", nameless), ("outside the folder", outside)):
        for prefix in prefixes:
            with pytest.raises(part(pack, "iteris_core").IterisError, match=message):
                save(lora, prefix)
    with pytest.raises(part(pack, "iteris_core").IterisError, match="no folder elsewhere"):
        save(lora, "one", folder="elsewhere")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("ordered", [True, False])
def test_a_file_at_a_smaller_rank(pack, save, tmp_path, ordered):
    """Ordered components are kept from the first on; others are cut by an SVD."""
    core, merging = part(pack, "iteris_core"), part(pack, "nodes.merging")
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(6, 4, generator=generator), torch.randn(4, 5, generator=generator)
    changes = {
        "unet.a": core.LowRank(up, down),
        "unet.b": core.LowRank(torch.randn(6, 4), torch.randn(4, 45), (3, 3)),
        "unet.c": core.LowRank(torch.ones(6, 1), torch.ones(1, 5)),
    }
    lora = core.Lora(changes, metadata={"iteris": '{"method": "iteris"}'})
    made = merging.LoraModel(lora, "float32", ordered=ordered)
    (name,) = save(made, "small", rank=2).result
    found, said = part(pack, "iteris_core.lora_files").read_tensors(tmp_path / "loras" / name)
    assert found["lora_unet_b.lora_up.weight"].shape == (6, 2, 1, 1)
    assert found["lora_unet_b.lora_down.weight"].shape == (2, 5, 3, 3)
    product = found["lora_unet_a.lora_up.weight"] @ found["lora_unet_a.lora_down.weight"]
    u, s, vt = torch.linalg.svd(up @ down)
    wanted = up[:, :2] @ down[:2] if ordered else u[:, :2] @ torch.diag(s[:2]) @ vt[:2]
    assert torch.allclose(product, wanted, atol=1e-5)
    assert json.loads(said["iteris"])["cut"] == {"rank": 2, "ordered": ordered}
    with pytest.raises(core.IterisError, match="Only a LoRA that an IterIS node made"):
        save(dict(made), "small", rank=2)


def test_no_path_of_this_machine_is_written(kit, save):
    (kit.loras / "cats").mkdir()
    inner, outer = kit.loras / "cats" / "inner.safetensors", kit.folder / "outer.safetensors"
    (kit.loras / "a.safetensors").rename(inner)
    (kit.loras / "b.safetensors").rename(outer)
    concepts = [kit.specs.make_spec(file, trigger="sks") for file in (inner, outer)]
    lora = kit.merging.as_lora_model(kit.merge(method="sum", concepts=concepts))
    recorded = [c["file"] for c in json.loads(lora.metadata["iteris"])["concepts"]]
    assert recorded == ["cats/inner.safetensors", "outer.safetensors"]
    (name,) = save(lora, "whole", card=True).result
    for end in (".safetensors", ".md", ".metadata.json"):
        written = (kit.loras / name).with_suffix(end).read_bytes()
        assert str(kit.folder).encode() not in written
