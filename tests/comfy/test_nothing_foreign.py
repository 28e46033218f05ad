"""Somebody else's files in every folder to which nodes write stay as they are."""

import dataclasses
from pathlib import Path

import pytest
import torch
from kit import SETTINGS, use_folders
from PIL import Image
from reduced_models.unets import sd15
from safetensors.torch import save_file

NAMES = ("merged", "merged_2", "merged_low", "mine")
"""Stems that the nodes below would use, and another."""


@pytest.fixture
def folders(kit, monkeypatch):
    """The folders for LoRAs, embeddings, images and temporary files, and what is kept."""
    import folder_paths

    use_folders(monkeypatch, kit.folder, "loras", "embeddings")
    for kind in ("user", "output", "temp"):
        (kit.folder / kind).mkdir()
    monkeypatch.setattr(folder_paths, "user_directory", str(kit.folder / "user"))
    monkeypatch.setattr(folder_paths, "output_directory", str(kit.folder / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(kit.folder / "temp"))
    monkeypatch.setenv("TMPDIR", str(kit.folder / "temp"))
    monkeypatch.setattr("tempfile.tempdir", str(kit.folder / "temp"))
    named = ("loras", "loras/iteris", "embeddings", "embeddings/iteris", "output", "temp", "user")
    found = [kit.folder / name for name in named]
    return [*found, kit.folder_of("merges"), kit.folder_of("samples")]


def planted(folders):
    """Files of others, by the names and kinds that nodes write: their contents and times."""
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        for stem in NAMES:
            save_file({"theirs": torch.ones(3)}, folder / f"{stem}.safetensors")
            (folder / f"{stem}.md").write_text("---\ntags:\n- lora\n- iteris\n---\n\nmy notes")
            Image.new("RGB", (8, 8), "red").save(folder / f"{stem}.preview.png")
        (folder / "toy.safetensors").write_bytes(b"no safetensors")
        (folder / "toy_2.pt").write_bytes(b"an embedding")
        (folder / ".merged-unfinished").mkdir()
        (folder / ".merged-unfinished" / "merged.safetensors.part").write_text("")
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {path: _state(path) for path in files}


def _state(path):
    return path.read_bytes(), path.stat().st_mtime_ns, path.stat().st_ino


def test_every_node_that_writes(kit, folders):
    theirs = planted(folders)
    other, _ = sd15()
    specs, settings = tuple(kit.concepts()), {**SETTINGS, "kept": "make again"}
    given = {"clip": kit.clip, "samples": 4, "settings": settings}
    merge = kit.node("merge_nodes", "IterisMerge").execute(kit.model, specs, **given).result
    compare = kit.node("merge_nodes", "CompareMerges").execute
    compare(kit.model, specs, row_1="iteris", row_2="average", **given)
    experts = kit.node("merge_nodes", "IterisMergeExperts").execute
    pairs = [dataclasses.replace(one, low=specs[1].file) for one in specs]
    experts(kit.model, other, pairs, 0.875, method="average", **given)
    how = {"rank": 2, "megabytes": 0.0, "energy": 0.0, "samples": 4, "seed": 0}
    resize = kit.node("edit_nodes", "ResizeLora").execute
    small = resize(kit.model, specs[:1], clip=kit.clip, **how, settings=SETTINGS).result
    extract = kit.node("edit_nodes", "ExtractLora").execute
    of_it = extract(kit.model, merge[0], kit.clip, merge[1], **how, settings=SETTINGS).result
    vectors = {"toy": {"clip_l": torch.ones(2, 4)}}
    save = kit.node("save_node", "SaveMergedLora").execute
    names: list[str] = []
    for made in (merge[2], small[2], of_it[2]):
        lora = kit.merging.LoraModel(dataclasses.replace(made.lora, embeddings=vectors))
        for prefix in ("merged", "iteris/merged"):
            picture = torch.rand(1, 8, 8, 3)
            shown = save(lora, prefix, thumbnail=picture, card=True)
            names.append(shown.result[0])
            with pytest.raises(kit.core.IterisError, match="IterIS did not write it"):
                save(lora, prefix, overwrite=True, thumbnail=picture, card=True)
    assert names[:2] == ["merged_3.safetensors", "iteris/merged_3.safetensors"]
    assert {path: _state(path) for path in theirs} == theirs


def test_only_our_own_previews_and_cards_are_replaced(kit, folders):
    """One that somebody changed since counts as theirs; the node says that it stays."""
    save = kit.node("save_node", "SaveMergedLora").execute
    lora = kit.lora_model(kit.merge(method="sum"))
    grey = [torch.full((1, 8, 8, 3), shade) for shade in (0.2, 0.8)]

    def saved(picture):
        shown = save(lora, "own", thumbnail=picture, card=True)
        return shown.result[0], shown.ui["text"][0]

    name, text = saved(grey[0])
    page, picture = ((kit.loras / name).with_suffix(end) for end in (".md", ".preview.png"))
    first = page.read_bytes(), picture.read_bytes()
    assert saved(grey[1]) == (name, text)
    assert page.read_bytes() == first[0]
    assert picture.read_bytes() != first[1]
    page.write_text(page.read_text() + "\nIt likes 30 steps.\n")
    with Image.open(picture) as made:
        changed = made.convert("RGB")
    changed.putpixel((0, 0), (255, 0, 0))
    changed.save(picture, pnginfo=None)
    theirs = _state(page), _state(picture)
    _, text = saved(grey[0])
    assert "own.md is not as IterIS wrote it" in text
    assert "own.preview.png is not as IterIS wrote it" in text
    assert (_state(page), _state(picture)) == theirs


def test_a_source_is_not_replaced_without_metadata_either(kit, folders, monkeypatch):
    """Under --disable-metadata the file has no recipe, but the merge knows its sources."""
    import comfy.cli_args

    monkeypatch.setattr(comfy.cli_args.args, "disable_metadata", True)
    save = kit.node("save_node", "SaveMergedLora").execute
    (name,) = save(kit.lora_model(kit.merge(method="sum")), "first").result
    of_it = [kit.specs.make_spec(kit.loras / name, trigger="sks"), kit.concepts()[0]]
    second = kit.lora_model(kit.merge(method="sum", concepts=of_it))
    before = _state(kit.loras / name)
    with pytest.raises(kit.core.IterisError, match="one of the LoRAs that were merged"):
        save(second, "first", overwrite=True)
    assert _state(kit.loras / name) == before


def test_each_strength_is_a_file_of_its_own_unless_they_may_be_overwritten(kit, folders):
    """A file draws what MODEL drew. Back at a strength, its file is the one that is there."""
    run = kit.node("merge_nodes", "IterisMerge").execute
    save = kit.node("save_node", "SaveMergedLora").execute
    given = {"clip": kit.clip, "method": "sum", "settings": SETTINGS}

    def saved(strength, **more):
        made = run(kit.model, kit.concepts(), strength=strength, **given)
        assert ("a file of its own" in made.result[3]) == (strength != 1)
        return save(made.result[2], "own", **more).result[0]

    assert [saved(s) for s in (1.0, 0.5, 1.0, 0.5)] == 2 * ["own.safetensors", "own_2.safetensors"]
    assert {saved(s, overwrite=True) for s in (0.3, 0.7)} == {"own.safetensors"}
    assert len(sorted(Path(kit.loras).glob("own*"))) == 2
