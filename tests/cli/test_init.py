"""``iteris init``: a merge file from a folder of LoRAs, which then runs."""

import json
import shutil

import pytest
import torch
import yaml
from command_line import QUICK, recipe_of
from safetensors.torch import load_file, save_file

import toybox
from iteris_core.cli.init import base_near, loras_in


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """``loras`` with what lies about in such folders, and the base beside it."""
    folder = tmp_path / "loras"
    folder.mkdir()
    (tmp_path / "base").symlink_to(world / "base")
    tensors = load_file(world / "lora1.safetensors")
    save_file(tensors, folder / "cat.safetensors", {"modelspec.trigger_phrase": "sks cat"})
    shutil.copy(world / "lora2.safetensors", folder / "dog.safetensors")
    words = {"trainedWords": ["zwx dog"]}
    (folder / "dog.civitai.info").write_text(json.dumps(words))
    save_file({"emb_params": torch.ones(1, 32)}, folder / "toy.safetensors")
    recipe = {"iteris": json.dumps({"method": "sum", "concepts": []})}
    save_file(tensors, folder / "both.safetensors", recipe)
    (folder / "cut.safetensors").write_bytes(b"\0\1\2")
    site = "transformer.single_transformer_blocks.0.attn.to_q"
    flux = {f"{site}.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    save_file(flux, folder / "flux.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_that_is_written_runs(place, iteris):
    text = iteris("init", "loras")
    assert text.startswith("Wrote merge.yaml: 2 LoRAs for SD 1.x.\nCheck its trigger words")
    for name, why in {
        "both": "a merge that iteris wrote", "toy": "no LoRA", "cut": "not a complete safetensors",
        "flux": "made for FLUX.1, the others for SD 1.x",
    }.items():  # fmt: skip
        assert f"Left out: {name}.safetensors ({why}" in iteris.err.replace(
            "loras/cut.safetensors is ", ""
        )
    data = yaml.safe_load((place / "merge.yaml").read_text())
    assert data == {
        "base": "base", "output": "merged.safetensors", "preset": "default",
        "concepts": [
            {"file": "loras/cat.safetensors", "trigger": "sks", "class": "cat"},
            {"file": "loras/dog.safetensors", "trigger": "zwx", "class": "dog"},
        ],
    }  # fmt: skip
    assert "# words from dog.civitai.info" in (place / "merge.yaml").read_text()
    iteris("merge", "merge.yaml", *QUICK)
    assert [c["trigger"] for c in recipe_of("merged.safetensors")["concepts"]] == ["sks", "zwx"]
    iteris("init", "loras", "--overwrite")
    # A second file names another result.
    iteris("init", "loras", "-o", "again.yaml")
    assert yaml.safe_load((place / "again.yaml").read_text())["output"] == "merged-2.safetensors"


def test_loras_in_subfolders_are_found(place, iteris):
    """But no weights of a pipeline, and no circle of links."""
    inner = place / "loras" / "animals" / "small"
    inner.mkdir(parents=True)
    (place / "loras" / "dog.safetensors").rename(inner / "cat.safetensors")
    (place / "loras" / "dog.civitai.info").unlink()
    (inner / "cat.json").write_text(json.dumps({"activation text": "zwx dog"}))
    (inner / "again").symlink_to(place / "loras")
    (place / "loras" / "base").symlink_to(place / "base")
    (place / "loras" / ".hidden").mkdir()
    shutil.copy(inner / "cat.safetensors", place / "loras" / ".hidden")
    assert iteris("init", "loras").startswith("Wrote merge.yaml: 2 LoRAs")
    assert "base" not in iteris.err
    assert yaml.safe_load((place / "merge.yaml").read_text())["concepts"] == [
        {"file": "loras/cat.safetensors", "trigger": "sks", "class": "cat"},
        {"file": "loras/animals/small/cat.safetensors", "trigger": "zwx", "class": "dog"},
    ]
    assert "# words from cat.json" in (place / "merge.yaml").read_text()


def test_what_is_not_known_is_named_and_the_merge_asks_for_it(place, iteris):
    (place / "loras" / "dog.civitai.info").unlink()
    text = iteris("init", "loras")
    assert "Without trigger words, so acting on every prompt: dog.safetensors." in text
    assert "# no trigger words: it acts on every prompt" in (place / "merge.yaml").read_text()


def test_the_base_is_the_pipeline_beside_or_the_usual_one(place, tmp_path):
    assert base_near(place / "loras", "SDXL")[0] == str(place / "base")
    (place / "other").symlink_to(place / "base")  # two: neither is clear
    assert base_near(place / "loras", "SDXL")[0] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert base_near(place / "loras", "SD 3") == ("", "none found; name one for LoRAs of SD 3")


def test_two_experts_are_one_concept(tmp_path):
    keys = [f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight" for part in "AB"]
    for name in ("cat_high_noise", "cat_low_noise", "highland"):
        save_file(
            dict.fromkeys(keys[:1], torch.ones(2, 2)) | {keys[1]: torch.zeros(2, 2)},
            tmp_path / f"{name}.safetensors",
            {"modelspec.architecture": "wan2.2"},
        )
    loras, left_out = loras_in(tmp_path)
    assert [one.name for one in loras] == [
        "cat_high_noise.safetensors + cat_low_noise.safetensors", "highland.safetensors",
    ]  # fmt: skip
    assert {one.family for one in loras} == {"wan2.2"}
    assert not left_out


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """``loras``, with copies of two of the toybox's: kohya's layout and diffusers'."""
    (tmp_path / "loras").mkdir()
    for name in ("sks1", "sks10"):
        shutil.copy(toybox.concepts()[name].lora, tmp_path / "loras")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_quick_start_runs_on_the_loras_that_ship(shipped, iteris):
    (shipped / "toybox").mkdir()  # the base's name never means a folder
    assert "Check its trigger words, then merge: iteris merge merge.yaml" in iteris("init", "loras")
    data = yaml.safe_load((shipped / "merge.yaml").read_text())
    assert data["base"] == "toybox"
    assert [(c["trigger"], c["class"]) for c in data["concepts"]] == [
        ("sks1", "star"), ("sks10", "cross"),
    ]  # fmt: skip
    iteris("merge", shipped / "merge.yaml", *QUICK)
    assert recipe_of("merged.safetensors")["base"] == "toybox"
    again = ("--from", "merged.safetensors", "--loras", "loras", "-o", "again.safetensors")
    iteris("merge", *again)
    assert "sks1 star, sks10 cross" in iteris("inspect", "merged.safetensors")


def test_what_ships_is_read_without_naming_its_base(shipped, iteris):
    files = [f"loras/{name}.safetensors" for name in ("sks1", "sks10")]
    text = iteris("inspect", *files, "--json")
    assert json.loads(text)["interference"][0]["shared"] == 68  # every attention projection
    for number, file in enumerate(files):
        text = iteris("convert", file, "-o", f"{number}.safetensors")
        assert "bit-identical to the original" in text
