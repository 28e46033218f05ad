"""Save Merged LoRA: names, ranks, and a full disk."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from kit import node, part, use_folders
from PIL import Image


@pytest.fixture
def save(pack, tmp_path, monkeypatch):
    use_folders(monkeypatch, tmp_path, "loras", "embeddings")
    return node(pack, "save_node", "SaveMergedLora").execute


def test_names_of_saved_files(pack, save, tmp_path):
    prefixes = ("one", "folder/one", "one", "one.safetensors", "v1.5/two")
    loras = [{"lora_unet_a.lora_up.weight": torch.full((3, 2), float(n))} for n in range(6)]
    names = [save(lora, p).result[0] for lora, p in zip(loras, prefixes, strict=False)]
    assert names == ["one.safetensors", "folder/one.safetensors", "one_2.safetensors",
                     "one_3.safetensors", "v1.5/two.safetensors"]  # fmt: skip
    lora = loras[-1]
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


def test_a_lora_is_written_once_and_replaces_only_what_may_go(kit, save):
    """Another picture changes the preview alone; a LoRA of somebody else, or one that was merged,
    stays."""
    lora = kit.lora_model(kit.merge(method="sum"))
    first = kit.loras / save(lora, "merged").result[0]
    before = first.stat().st_mtime_ns, first.stat().st_ino
    for grey in (0.2, 0.8):
        assert save(lora, "merged", thumbnail=torch.full((1, 8, 8, 3), grey)).result == (
            first.name,
        )
    with Image.open(first.with_suffix(".preview.png")) as picture:
        assert picture.getpixel((0, 0)) == (204, 204, 204)
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == before
    other = kit.lora_model(kit.merge(method="average"))
    assert save(other, "merged").result == ("merged_2.safetensors",)
    assert save(lora, "merged").result == ("merged.safetensors",)
    assert save(other, "merged", overwrite=True).result == ("merged.safetensors",)
    with pytest.raises(kit.core.IterisError, match=r"a\.safetensors is not overwritten: I"):
        save(lora, "a", overwrite=True)
    of_it = [kit.specs.make_spec(first, trigger="sks"), kit.concepts()[0]]
    third = kit.lora_model(kit.merge(method="sum", concepts=of_it))
    with pytest.raises(kit.core.IterisError, match="one of the LoRAs that were merged"):
        save(third, "merged", overwrite=True)


def test_a_file_without_metadata(kit, save, monkeypatch):
    """As ComfyUI's --disable-metadata asks: no recipe, no prompts; it is still known as ours."""
    import comfy.cli_args

    monkeypatch.setattr(comfy.cli_args.args, "disable_metadata", True)
    (name,) = save(lora := kit.lora_model(kit.merge(method="sum")), "bare").result
    _, said = part(kit.pack, "iteris_core.lora_files").read_tensors(kit.loras / name)
    assert said.keys() == {"iteris", "modelspec.hash_sha256"}
    assert said["iteris"] == "{}"
    assert save(lora, "bare", card=True).result == (name,)


def test_a_folder_that_cannot_be_written(kit, save):
    """As root every folder can; a file in a folder's place cannot be one."""
    (kit.loras / "taken").write_text("")
    with pytest.raises(kit.core.IterisError, match="taken/one cannot be written"):
        save({"lora_unet_a.lora_up.weight": torch.ones(3, 2)}, "taken/one")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_folders_that_are_read_only(kit, save, monkeypatch, code):
    """The models': one sentence, and the merge is kept. The user's: a merge is made, not kept."""
    import folder_paths

    user, make = Path(folder_paths.get_user_directory()), os.mkdir

    def refuse(path, *args, **more):
        if any(Path(path).is_relative_to(root) for root in (kit.loras, user)):
            raise OSError(code, os.strerror(code), str(path))
        return make(path, *args, **more)

    monkeypatch.setattr(os, "mkdir", refuse)
    merge = kit.node("merge_nodes", "IterisMerge").execute
    lora = merge(kit.model, tuple(kit.concepts()), clip=kit.clip, method="average").result[2]
    before = sorted(kit.loras.rglob("*"))
    for prefix in ("one", "folder/one"):
        with pytest.raises(kit.core.IterisError) as found:
            save(lora, prefix)
        assert os.strerror(code) in str(found.value)
        assert str(found.value).endswith("The merge is kept; queue again to save it.")
        assert str(kit.folder) not in str(found.value)
    assert sorted(kit.loras.rglob("*")) == before


def test_the_file_is_there_before_its_thumbnail_is_drawn(kit, save):
    found = kit.node("save_node", "SaveMergedLora")
    lora = {"lora_unet_a.lora_up.weight": torch.ones(3, 2)}
    given = {"lora": lora, "filename_prefix": "early"}
    assert found.check_lazy_status(**given) == []
    assert not (kit.loras / "early.safetensors").exists()
    assert found.check_lazy_status(**given, thumbnail=None) == ["thumbnail"]
    assert (kit.loras / "early.safetensors").exists()


def test_no_path_of_this_machine_is_written(kit, save):
    (kit.loras / "cats").mkdir()
    inner, outer = kit.loras / "cats" / "inner.safetensors", kit.folder / "outer.safetensors"
    (kit.loras / "a.safetensors").rename(inner)
    (kit.loras / "b.safetensors").rename(outer)
    concepts = [kit.specs.make_spec(file, trigger="sks") for file in (inner, outer)]
    lora = kit.lora_model(kit.merge(method="sum", concepts=concepts))
    recorded = [c["file"] for c in json.loads(lora.metadata["iteris"])["concepts"]]
    assert recorded == ["cats/inner.safetensors", "outer.safetensors"]
    (name,) = save(lora, "whole", card=True).result
    for end in (".safetensors", ".md"):
        written = (kit.loras / name).with_suffix(end).read_bytes()
        assert str(kit.folder).encode() not in written


# What Lora-Manager's BaseModelMetadata cannot be made without.
NEEDED = {"file_name", "model_name", "file_path", "size", "modified", "sha256", "base_model",
          "preview_url"}  # fmt: skip


def test_lora_manager_reads_what_is_beside_the_file(kit, save):
    """Ours is brought up to date; what Lora-Manager or a user made of it stays."""
    lora = kit.lora_model(kit.merge(method="sum"))
    picture = torch.full((1, 8, 8, 3), 0.5)
    (name,) = save(lora, "sub/merged", card=True).result
    file = kit.loras / name
    path = file.with_suffix(".metadata.json")
    content = json.loads(path.read_text())
    assert content.keys() >= NEEDED
    assert content["civitai"]["trainedWords"] == ["sks cat", "zwx dog"]
    assert content["size"] == file.stat().st_size
    assert content["sha256"] == part(kit.pack, "iteris_core.lora_files.tensors").file_digest(file)
    assert content["base_model"] == "SD 1.5"
    assert (content["file_name"], content["preview_url"]) == ("merged", "")
    assert str(kit.folder) not in path.read_text()
    specs = part(kit.pack, "iteris_core.lora_files.metadata")
    assert specs.find_phrases(file, {}) == (("sks cat", "zwx dog"), ".metadata.json")
    save(lora, "sub/merged", card=True, thumbnail=picture)
    assert json.loads(path.read_text())["preview_url"] == "merged.preview.png"
    other = kit.lora_model(kit.merge(method="average"))
    save(other, "sub/merged", card=True, overwrite=True)
    assert json.loads(path.read_text())["sha256"] != content["sha256"]
    theirs = path.read_text().replace('"tags": [', '"favorite": true, "tags": [')
    path.write_text(theirs)
    shown = save(lora, "sub/merged", card=True, overwrite=True).ui["text"][0]
    assert path.read_text() == theirs
    assert "merged.metadata.json is not as IterIS wrote it, so it stays" in shown
    save(lora, "plain")
    assert not (kit.loras / "plain.metadata.json").exists()
