"""``iteris score`` and ``iteris compare`` on small real models."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from PIL import Image
from tiny import make_pipeline, random_lora

import toybox
from iteris_core import Concept, IterisError, Lora, cli, write_lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.score.compare import fill_prompts
from iteris_core.score.statistics import Stat, csv_table, markdown_table, over_seeds

CLIP = f"--clip=local-dir:{toybox.ROOT / 'weights' / 'clip'}"


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["iteris", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(scope="module")
def references():
    return next(iter(toybox.concepts().values())).references[0].parent


def test_standard_errors_are_over_seeds():
    stat = over_seeds([1.0, 3.0, 2.0, 6.0], [7, 7, 8, 8])
    assert stat.mean == 3.0
    assert stat.se == pytest.approx(1.0)  # the seeds' means are 2 and 4
    assert over_seeds([1.0, 2.0], [1, 1]).to_dict() == {"mean": 1.5, "se": None}


def test_tables_leave_gaps_empty():
    rows = {"one": {"image": Stat(0.5, 0.1)}, "two": {"text": Stat(0.25, float("nan"))}}
    assert "| one | 0.5000 ± 0.1000 |  |" in markdown_table(rows)
    assert "| two |  | 0.2500 |" in markdown_table(rows)
    parsed = list(csv.reader(csv_table(rows).splitlines()))
    assert parsed[0] == ["method", "image mean", "image se", "text mean", "text se"]
    assert parsed[1][:3] == ["one", "0.5", "0.1"]


def test_prompts_are_filled():
    concepts = [
        Concept(Lora({}), trigger="sks", class_word="cat"),
        Concept(Lora({}), trigger="zwx", class_word="dog"),
    ]
    assert fill_prompts(["{all} outside", "a {2} left of a {1}"], concepts) == [
        "a sks cat and a zwx dog outside",
        "a zwx dog left of a sks cat",
    ]
    with pytest.raises(IterisError, match="placeholder"):
        fill_prompts(["a {3}"], concepts)


def test_score_prints_alignments(monkeypatch, capsys, references, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star with yellow stripes on a white background\n")
    code, out, _ = run(
        monkeypatch, capsys,
        "score", references, f"--refs={references}", f"--prompts={prompts}", CLIP, "--json",
    )  # fmt: skip
    assert code == 0
    data = json.loads(out)
    assert len(data["pictures"]) == len(list(references.iterdir()))
    assert 0.5 < data["mean"]["image"] <= 1
    assert data["mean"]["clipscore"] == pytest.approx(2.5 * data["mean"]["text"], abs=1e-4)
    code, out, _ = run(monkeypatch, capsys, "score", references, f"--refs={references}", CLIP)
    assert code == 0
    assert "mean" in out


def test_score_with_dino(monkeypatch, capsys, references, tmp_path):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(tmp_path / "dino")
    processor = BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path / "dino")
    code, out, _ = run(
        monkeypatch, capsys,
        "score", references, f"--refs={references}", CLIP, f"--dino={tmp_path / 'dino'}", "--json",
    )  # fmt: skip
    assert code == 0
    assert -1 <= json.loads(out)["mean"]["dino"] <= 1.0001


def test_score_errors(monkeypatch, capsys, references, tmp_path):
    code, _, err = run(monkeypatch, capsys, "score", references, CLIP)
    assert code == 2
    assert "nothing to score against" in err
    code, _, err = run(monkeypatch, capsys, "score", tmp_path, f"--refs={references}", CLIP)
    assert code == 2
    assert "no folder with pictures" in err
    (tmp_path / "bad.png").write_text("no picture")
    code, _, err = run(monkeypatch, capsys, "score", tmp_path, f"--refs={references}", CLIP)
    assert code == 2
    assert "bad.png is not a picture" in err
    assert "Traceback" not in err


def test_methods_are_listed(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "methods")
    assert code == 0
    for name in ("iteris", "ssr", "ties", "align"):
        assert name in out


def test_compare_from_files_to_a_page(monkeypatch, capsys, references, tmp_path):
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "base")
    host = DiffusersHost(pipeline)
    concepts, refs = [], []
    for seed in (1, 2):
        path = write_lora(random_lora(host, seed), tmp_path / f"lora{seed}.safetensors")
        concepts.append(f"--concept={path}:s{seed}:dog")
        refs.append(f"--refs={references}")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("{all}\na {1} near a {2}\n")
    out = tmp_path / "out"
    arguments = ["compare", tmp_path / "base", *concepts, "-o", out, CLIP, "--samples=3"]
    arguments += ["--methods=base,average,iteris", f"--prompts={prompts}", "--steps=2"]
    arguments += ["--images-per-prompt=2", "--device=cpu"]
    code, text, _ = run(monkeypatch, capsys, *arguments, *refs)
    assert code == 0
    assert "| iteris |" in text
    data = json.loads((out / "comparison.json").read_text())
    assert list(data["methods"]) == ["base", "average", "iteris"]
    row = data["methods"]["iteris"]
    assert {"image 1", "image 2", "text", "text, tokens kept", "mean"} <= set(row)
    assert row["image 1"]["se"] is not None
    assert data["prompts"][0] == "a s1 dog and a s2 dog"
    assert {p.name for p in out.iterdir()} == {
        *("comparison.json", "comparison.csv", "comparison.md", "index.html", "sheet.png"),
    }
    assert Image.open(out / "sheet.png").size[0] > 300
    code, _, err = run(monkeypatch, capsys, *arguments, refs[0])
    assert code == 2
    assert "--refs once for each --concept" in err
