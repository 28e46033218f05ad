"""``iteris compare`` on small real models."""

import json
import sys

import pytest
import torch
from command_line import make_world
from PIL import Image
from tiny import make_pipeline, random_lora

import iteris_core.score.compare as compare_module
import toybox
from iteris_core import Concept, IterisError, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score.drawing import Drawing
from iteris_core.score.measures import (
    add_shares,
    fill_prompts,
    judged_prompts,
    over_seeds,
)
from iteris_core.settings import PRESETS

CLIP = f"--clip=local-dir:{toybox.ROOT / 'weights' / 'clip'}"


@pytest.fixture(scope="module")
def references():
    return next(iter(toybox.concepts().values())).references[0].parent


def test_standard_errors_are_over_seeds():
    stat = over_seeds([1.0, 3.0, 2.0, 6.0], [7, 7, 8, 8])
    assert stat.mean == 3.0
    assert stat.se == pytest.approx(1.0)  # the seeds' means are 2 and 4
    assert over_seeds([1.0, 2.0], [1, 1]).to_dict() == {"mean": 1.5, "se": None}


def test_prompts_are_filled():
    concepts = [
        Concept(Lora({}), trigger="sks", class_word="cat"),
        Concept(Lora({}), trigger="zwx", class_word="dog"),
    ]
    assert fill_prompts(["{all} outside", "a {2} left of a {1}"], concepts) == [
        "a sks cat and a zwx dog outside",
        "a zwx dog left of a sks cat",
    ]
    assert fill_prompts(["a {each} outside"], concepts) == [
        "a sks cat outside",
        "a zwx dog outside",
    ]
    with pytest.raises(IterisError, match="placeholder"):
        fill_prompts(["a {3}"], concepts)


def test_a_concept_is_judged_on_the_prompts_that_name_it_alone():
    concepts = [Concept(Lora({}), trigger=name, class_word="cat") for name in ("sks", "zwx")]
    templates = ["{all}", "a {1} left of a {2}", "a photo of a {each}", "a sks cat asleep", "rain"]
    assert judged_prompts(templates, concepts) == [[2, 4], [3]]
    assert judged_prompts(["{all}", "{1}"], concepts) == [[1], [0]]
    with pytest.raises(IterisError, match=r"No prompt names concept 2 \('zwx cat'\)"):
        judged_prompts(["a {1}"], concepts)


def test_a_lora_that_draws_nothing_like_its_references_has_no_share():
    columns = {
        "alone a": {"image a": torch.tensor([0.5])},
        "alone b": {"image b": torch.tensor([-0.1])},
        "sum": {"image a": torch.tensor([0.25]), "image b": torch.tensor([0.2])},
    }
    add_shares(columns, ["a", "b"])
    assert columns["sum"]["share"].tolist() == [0.5]


class Colours:
    """A scorer in whose eyes a picture is its colour, and a text nothing."""

    def embed_images(self, pictures):
        colours = [torch.tensor(picture.getpixel((0, 0))) / 255.0 for picture in pictures]
        return torch.stack(colours)

    def embed_texts(self, texts):
        return torch.zeros(len(texts), 3)


def test_likeness_leaves_out_pictures_that_name_other_concepts(monkeypatch):
    """A method that draws each concept well, and both in one picture as neither, has likeness 1."""
    host = DiffusersHost(make_pipeline())
    concepts = [
        Concept(random_lora(host, seed), trigger=f"s{seed}", class_word="dog") for seed in (1, 2)
    ]
    drawn = []

    def draw(pipeline, wanted, *_):
        drawn.append([prompt for prompt, _ in wanted])
        colours = {"a s1 dog": "#f00", "a s2 dog": "#0f0"}
        return [Image.new("RGB", (8, 8), colours.get(prompt, "#00f")) for prompt, _ in wanted]

    monkeypatch.setattr(compare_module, "draw", draw)
    rows, parts = [], set()
    found = compare_module.compare_methods(
        host.pipeline, host, concepts,
        [[Image.new("RGB", (8, 8), "#f00")], [Image.new("RGB", (8, 8), "#0f0")]],
        Colours(), methods=["alone", "average"], templates=["{all}", "a {each}"], settings={},
        drawing=Drawing(images_per_prompt=2),
        on_row=lambda comparison: rows.append(list(comparison.rows)),
        on_progress=lambda progress: parts.add(progress.what.rpartition(": ")[0]),
    )  # fmt: skip
    assert parts == {"alone s1", "alone s2", "average"}
    assert found.rows["average"]["image s1"].mean == 1
    assert found.rows["average"]["image s2"].mean == 1
    assert found.rows["average"]["share"].mean == 1
    assert drawn[0] == ["a s1 dog"] * 2
    assert [picture is None for picture in found.pictures["alone s1"]] == [True] * 2 + [
        False
    ] * 2 + [True] * 2
    assert rows[:2] == [["alone s1"], ["alone s1", "alone s2"]]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("world"))
    (folder / "prompts.txt").write_text("{all}\na {1} near a {2}\n")
    (folder / "templates.txt").write_text("a picture of {}\n")
    return folder


def compare(world, references, out, *extra):
    """``iteris compare`` of two LoRAs, which share their references."""
    arguments = ["compare", world / "base", "-o", out, CLIP, "--set=samples=3", "--device=cpu"]
    arguments += [f"--prompts={world / 'prompts.txt'}", "--steps=2", "--images-per-prompt=2"]
    for number in (1, 2):
        file = world / f"lora{number}.safetensors"
        arguments += [f"--concept={file}:s{number}:dog", f"--refs={references}"]
    return [*arguments, *extra]


def test_compare_from_files_to_a_sheet(world, iteris, references, tmp_path):
    out = tmp_path / "out"
    arguments = compare(world, references, out, "--methods=base,average,iteris")
    text = iteris(*arguments)
    assert "| iteris |" in text
    data = json.loads((out / "comparison.json").read_text())
    assert list(data["methods"]) == ["base", "average", "iteris"]
    row = data["methods"]["iteris"]
    assert {"image s1", "image s2", "text", "text, tokens kept", "mean"} <= set(row)
    assert row["image s1"]["se"] is not None
    assert data["prompts"][0] == "a s1 dog and a s2 dog"
    assert data["concepts"] == ["s1", "s2"]
    assert {p.name for p in out.iterdir()} == {*("comparison.json", "comparison.md", "sheet.png")}
    assert data["settings"]["iteris"]["schedule"] == "sweep"
    assert (data["calibration"]["samples"], data["drawing"]["steps"]) == (3, 2)
    assert Image.open(out / "sheet.png").size[0] > 300
    assert (out / "comparison.md").read_text() in text
    err = iteris.refused(*arguments[:-2], "--methods=base")
    assert "--refs once for each --concept" in err


def test_settings_of_one_method_and_of_all(world, iteris, monkeypatch, references, tmp_path):
    """And every other option: they reach the merge, the pictures and the scorer."""
    merges, drawn = [], []

    def merge_loras(host, concepts, method, **how):
        merges.append((method, how))
        return merge(host, concepts, method, **how)

    def draw_pictures(pipeline, wanted, drawing, on_progress):
        drawn.append(drawing)
        return draw(pipeline, wanted, drawing, on_progress)

    merge, draw = compare_module.merge_loras, compare_module.draw
    monkeypatch.setattr(compare_module, "merge_loras", merge_loras)
    monkeypatch.setattr(compare_module, "draw", draw_pictures)
    out = tmp_path / "out"
    iteris(
        *compare(
            world, references, out, "--methods=ties,regmean", "--set=ties.density=0.3",
            "--set=rank=2", "--set=timesteps=1", "--set=regmean.shrink=0.5", "--preset=fast",
            "--set=latent_size=4", f"--templates={world / 'templates.txt'}", "--width=16",
            "--height=8", "--guidance=3", "--batch=1", "--seed=5", "--memory=0.5",
            "--base-dtype=float32",
        ),
    )  # fmt: skip
    how = dict(merges)
    assert how["ties"]["settings"] == {"density": 0.3, "rank": 2}
    assert how["regmean"]["settings"] == {"rank": 2, "shrink": 0.5}
    calibration = how["ties"]["calibration"]
    assert calibration == {
        "samples": 3, "timesteps": 1, "latent_size": 4, "templates": ["a picture of {}"], "seed": 5,
    }  # fmt: skip
    assert {h["preset"] for h in how.values()} == {"fast"}
    assert {h["memory_budget"] for h in how.values()} == {1 << 29}
    assert drawn == [Drawing(2, 2, 3.0, 5, 1, 16, 8)] * 2
    found = json.loads((out / "comparison.json").read_text())
    made = found["calibration"]
    fast = {**PRESETS["fast"].calibration, "total_samples": None}
    assert made == {**made, **fast, **calibration}


def test_what_was_finished_is_kept(world, iteris, monkeypatch, references, tmp_path):
    """Ctrl-C in the second method leaves the first; and no other comparison is replaced."""
    out, merge = tmp_path / "out", compare_module.merge_loras

    def merge_loras(host, concepts, method, **how):
        if method == "average":
            raise KeyboardInterrupt
        return merge(host, concepts, method, **how)

    monkeypatch.setattr(compare_module, "merge_loras", merge_loras)
    arguments = compare(world, references, out, "--methods=sum,average")
    code, _, err = iteris.run(*arguments)
    assert code != 0
    assert "has what was finished: sum" in err
    assert list(json.loads((out / "comparison.json").read_text())["methods"]) == ["sum"]
    err = iteris.refused(*arguments)
    assert "comparison.json exists already; choose another name, or overwrite it" in err
    monkeypatch.setattr(compare_module, "merge_loras", merge)
    iteris(*arguments, "--overwrite")


def test_offload_reaches_the_base(world, iteris, monkeypatch, references, tmp_path):
    seen = {}

    def load_base(base, device, dtype, offload):
        seen.update(dtype=dtype, offload=offload)
        raise IterisError("stop here")

    monkeypatch.setattr(sys.modules["iteris_core.cli.compare"], "load_base", load_base)
    arguments = compare(world, references, tmp_path / "out", "--offload=model")
    iteris.refused(*arguments)
    assert seen == {"dtype": None, "offload": "model"}
