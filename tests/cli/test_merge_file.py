"""A merge file does what the command line does."""

import json
import shutil

import pytest
import torch
import typer
import yaml
from command_line import QUICK, recipe_of, same
from safetensors.torch import save_file

from iteris_core import cli
from iteris_core.cli.merge_file import KEYS, keys_of


@pytest.fixture
def place(world, tmp_path):
    """A copy of the world in which the test may write."""
    return shutil.copytree(world, tmp_path / "place")


def write(path, **data):
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


CONCEPTS = [
    {"file": "lora1.safetensors", "trigger": "sks", "class": "cat", "strength": 0.8,
     "text_strength": 0.5, "weight": 2},
    {"file": "lora2.safetensors", "prompts": "own.txt"},
    {"prompts": "kept.txt", "weight": 0.3},
]  # fmt: skip


@pytest.mark.slow
def test_a_merge_file_is_the_same_merge_as_the_options(place, iteris, monkeypatch):
    (place / "own.txt").write_text("a zwx dog\nzwx in the snow\n")
    (place / "kept.txt").write_text("a street\n")
    monkeypatch.chdir(place.parent)  # its paths are its own folder's
    write(
        place / "merge.yaml", base="base", output="of_file.safetensors", concepts=CONCEPTS,
        dtype="float32", layout="peft",
        settings={"rank": 3, "repair": "false", "ridge": 1e-4},
        calibration={"samples": 3, "timesteps": 1, "latents": "noise", "empty_share": 0.0},
        device="cpu",
    )  # fmt: skip
    assert "of_file.safetensors" in iteris("merge", "place/merge.yaml")
    out = place / "of_options.safetensors"
    iteris(
        "merge", place / "base", "-o", out, *QUICK, "--empty-share=0",
        f"--concept={place}/lora1.safetensors:sks:cat:0.8/0.5,weight=2",
        f"--concept=file={place}/lora2.safetensors,prompts={place}/own.txt",
        f"--concept=prompts={place}/kept.txt,weight=0.3", "--dtype=float32",
        "--layout=peft", "--set=rank=3", "--set=repair=false", "--set=ridge=1e-4",
    )  # fmt: skip
    assert same(place / "of_file.safetensors", out)
    concepts = recipe_of(out)["concepts"]
    assert [c["weight"] for c in concepts] == [2.0, 1.0, 0.3]
    assert (concepts[0]["strength"], concepts[0]["text_strength"]) == (0.8, 0.5)
    assert concepts[1]["prompts"] == ["a zwx dog", "zwx in the snow"]
    # The command line counts over the file.
    iteris(
        "merge", "place/merge.yaml", "-o", out, "--overwrite",
        "--set=rank=2", "--samples=2", f"--concept={place}/lora1.safetensors:sks:cat",
    )  # fmt: skip
    recipe = recipe_of(out)
    assert (recipe["settings"]["rank"], recipe["calibration"]["samples"]) == (2, 2)
    assert recipe["settings"]["repair"] is False
    assert len(recipe["concepts"]) == 1


def test_words_and_paths_mean_what_they_mean_to_a_user(place, iteris, monkeypatch):
    """YAML's ``no`` is false, and nobody expands ``~`` but a shell."""
    monkeypatch.setenv("HOME", str(place))
    away = place / "away"
    away.mkdir()
    (away / "merge.yaml").write_text(
        "base: ~/base\noutput: ~/of_home.safetensors\ndevice: cpu\nmethod: sum\nminutes: none\n"
        "templates: ~/lines.txt\nconcepts:\n"
        "- {file: ~/lora1.safetensors, trigger: s1, always_on: no}\n- ~/lora2.safetensors:s2:dog\n"
    )
    (place / "lines.txt").write_text("a {}\n")
    iteris("merge", away / "merge.yaml")
    recipe = recipe_of(place / "of_home.safetensors")
    assert [one["file"] for one in recipe["concepts"]] == ["lora1.safetensors", "lora2.safetensors"]
    assert recipe["concepts"][0]["always_on"] == "no"


@pytest.mark.slow
def test_a_merge_comes_again_on_the_base_beside_it(place, iteris):
    merged, again = place / "merged.safetensors", place / "again.safetensors"
    (place / "kept.txt").write_text("a street\n")
    arguments = [
        f"--concept={place}/lora1.safetensors:sks:cat:0.5,weight=3",
        f"--concept={place}/lora2.safetensors:zwx:dog", f"--concept=prompts={place}/kept.txt",
    ]  # fmt: skip
    iteris("merge", place / "base", "-o", merged, *QUICK, "--method=regmean", *arguments)
    assert recipe_of(merged)["base"] == "base"
    iteris("merge", "--from", merged, "-o", again, "--device=cpu")
    assert same(merged, again)
    # A merge file's settings count over the recipe's.
    file = write(place / "merge.yaml", settings={"rank": 2}, calibration={"samples": 2})
    iteris("merge", file, "--from", merged, "-o", again, "--overwrite", "--device=cpu")
    recipe = recipe_of(again)
    assert (recipe["method"], recipe["settings"]["rank"]) == ("regmean", 2)
    assert (recipe["calibration"]["samples"], recipe["calibration"]["timesteps"]) == (2, 1)


def test_every_option_of_merge_is_a_key():
    command = typer.main.get_command(cli.app).commands["merge"]
    keys = {*keys_of(command), *KEYS}
    names = {max(p.opts, key=len).removeprefix("--").replace("-", "_") for p in command.params}
    # --concept is concepts, --set is settings and calibration.
    assert names - {"help", "set", "concept"} <= keys
    assert {"concepts", "settings", "calibration", "base", "output", "offload"} <= keys


def test_a_recipe_reads_no_file_that_it_names_and_fetches_no_base(place, iteris):
    """A merged file may be anybody's."""
    secret = place / "secret.txt"
    secret.write_text("a secret\n")
    concept = {"file": "lora1.safetensors", "prompts": str(secret)}
    recipe = {"method": "iteris", "settings": {}, "calibration": {}, "base": "somebody/model"}
    for changes, message in (
        ({"concepts": [concept], "base": "base"}, "prompts: Input should be a list of strings"),
        ({"concepts": []}, "merged on somebody/model, which was not found; give BASE"),
        ({"concepts": [], "base": ""}, "The file names none; give BASE"),
        ({"concepts": [], "base": 3}, "no complete merge recipe"),
        ({"concepts": [], "unmergeable": "all"}, "no complete merge recipe"),
    ):
        path = place / "anybody.safetensors"
        save_file({"a": torch.ones(1)}, path, {"iteris": json.dumps({**recipe, **changes})})
        out = place / "out.safetensors"
        assert message in iteris.refused("merge", f"--from={path}", "-o", out)
