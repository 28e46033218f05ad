"""A merge is one value; a merge file, a recipe and the command line write it in the same way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from tiny import random_lora

from iteris_core import Calibration, Concept, IterisError, cli, merge_loras
from iteris_core.cli.request import read_recipe
from iteris_core.config import MergeConfig
from iteris_core.methods.registry import settings_over
from iteris_core.settings import declared_settings

pytestmark = pytest.mark.usefixtures("unmeasured")

CONFIG = MergeConfig(
    concepts=(
        Concept(
            file=Path("high.safetensors"), prompts=("a sks cat",), trigger="sks", class_word="cat",
            kind="style", strength=0.8, text_strength=0.0, weight=2.0, sha256="1+2",
            low=Path("low.safetensors"), reading={"energy": 0.5},
        ),
        Concept(file=Path("joy.safetensors"), subjects=("one", "two")),
        Concept.preserve(("a street",)),
    ),
    method="ties", preset="fast", settings={"rank": 3, "density": 0.3}, unmergeable="skip",
    calibration={"samples": 4, "templates": ["a {}"]}, base="base",
)  # fmt: skip


def test_a_config_comes_back_from_its_dictionary():
    data = json.loads(json.dumps(CONFIG.to_dict()))
    assert MergeConfig.from_dict(data, "it") == CONFIG
    assert MergeConfig.from_dict(MergeConfig().to_dict(), "it") == MergeConfig()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"base": 3}, "it: base: Input should be a valid string, not 3"),
        ({"unmergeable": "all"}, "it: unmergeable: Input should be 'refuse', 'skip' or"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(data, message):
    with pytest.raises(IterisError, match=message):
        MergeConfig.from_dict(data, "it")


@pytest.mark.parametrize("key", ["strength", "text_strength", "weight"])
def test_a_strength_is_no_truth_value(key):
    with pytest.raises(IterisError, match=f"it: {key}: .*must be a number, not True"):
        Concept.from_dict({"file": "a.safetensors", key: True}, "it")


def test_the_recipe_of_a_merge_from_python_is_its_config(host, tmp_path):
    """The settings that the preset gave stand in it, so that it is the merge without a preset."""
    concepts = [
        Concept(replace(random_lora(host, seed), source=f"{seed}.safetensors", sha256="ab"),
                trigger=f"s{seed}", class_word="dog", strength=0.5)
        for seed in (1, 2)
    ]  # fmt: skip
    given = {"timesteps": 1, "latents": "noise", "samples": 3, "denoising_steps": 1}
    result = merge_loras(host, concepts, preset="fast", settings={"rank": 2}, calibration=given)
    found = read_recipe(result.save(tmp_path / "merged.safetensors"))
    settings, calibration = settings_over(
        found.preset, found.method, found.settings, found.calibration
    )
    wanted = settings_over("fast", "iteris", {"rank": 2}, given)
    assert settings == wanted[0]
    assert {**vars(calibration), "templates": tuple(calibration.templates)} == vars(wanted[1])
    assert [(str(one.file), one.trigger, one.strength) for one in found.concepts] == [
        ("1.safetensors", "s1", 0.5), ("2.safetensors", "s2", 0.5),
    ]  # fmt: skip


def test_every_setting_of_the_calibration_is_an_option():
    command = typer.main.get_command(cli.app).commands["merge"]
    names = {parameter.name for parameter in command.params}
    assert {*declared_settings(Calibration), "templates"} <= names
