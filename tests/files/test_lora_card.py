"""The card of a merged file."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from oracle import make_lora
from PIL import Image
from safetensors.torch import save_file
from tiny import random_lora

from iteris_core import Concept, Lora, merge_loras
from iteris_core.report.card import card_of, write_card


def merged(folder):
    """A file as a merge writes its metadata; one source says under which licence it is."""
    named = {"cat": {"modelspec.license": "CC-BY-4.0"}, "a_dog": {}}
    concepts = [
        Concept(
            Lora(make_lora(seed).sites, name, metadata, f"{name}.safetensors", "ab" * 32),
            None,
            word,
            name,
        )
        for seed, (name, metadata, word) in enumerate(
            ((n, m, f"sk`s{i}") for i, (n, m) in enumerate(named.items())), 1
        )
    ]
    result = merge_loras(None, concepts, "ties", settings={"density": 0.5})
    file = folder / "my_merge.safetensors"
    save_file({"x": torch.zeros(1)}, file, dict(result.lora.metadata))
    return file, result.report


def test_a_card_says_what_the_file_says(tmp_path):
    file, report = merged(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "my_merge.preview.png")
    card = write_card(file, report)
    text = card.read_text()
    assert card.name == "my_merge.md"
    assert "# my\\_merge\n" in text
    assert "(<my_merge.preview.png>)" in text
    assert "- `sk's0 cat`\n- `sk's1 a_dog`" in text
    assert "| cat | abababababab | 1.0 | 1.0 |\n| a\\_dog | abab" in text
    assert "Licences of the sources: cat: CC-BY-4.0" in text
    assert "- method: `ties`" in text
    assert "density=0.5" in text
    assert "iteris merge --from my_merge.safetensors" in text
    assert str(tmp_path) not in text


def test_the_hub_reads_the_base_the_licence_and_the_words(tmp_path):
    recipe = {"base": "someone/a-base", "concepts": [{"lora": "cat", "trigger": "a: `sks`"}]}
    metadata = {
        "iteris": json.dumps(recipe),
        "modelspec.license": "cat: CC-BY-4.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }
    file = tmp_path / "merged.safetensors"
    save_file({"x": torch.zeros(1)}, file, metadata)
    write_card(file)
    data = ModelCard.load(file.with_suffix(".md")).data
    assert data.base_model == "someone/a-base"
    assert data.license == "cc-by-4.0"
    assert data.library_name == "diffusers"
    assert data.tags == ["lora", "iteris"]
    assert data.to_dict()["instance_prompt"] == "a: `sks`"


@pytest.mark.parametrize("licence", ["cat: CC-BY-4.0", "cat: CC-BY-4.0; dog: MIT", "my own terms"])
def test_the_hub_is_told_no_folder_and_no_licence_that_not_all_have(licence):
    recipe = {"base": "my_base", "concepts": [{"lora": "cat"}, {"lora": "dog"}]}
    text = card_of(
        Path("m.safetensors"), {"iteris": json.dumps(recipe), "modelspec.license": licence}
    )
    assert text.startswith("---\ntags:\n- lora\n- iteris\n---\n")


def test_the_verdict_comes_from_the_report(tmp_path):
    from oracle import ModuleHost, Net, make_data

    concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]
    result = merge_loras(ModuleHost(Net(), make_data(2)), concepts)
    file = tmp_path / "merged.safetensors"
    save_file({"x": torch.zeros(1)}, file, dict(result.lora.metadata))
    text = write_card(file, result.report).read_text()
    assert result.report.verdict() in text


def test_any_file_has_a_card(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, file, {"iteris": '{"concepts": 3, "settings": []}'})
    assert write_card(file).read_text().startswith("---\n")


def test_the_card_of_a_merge_of_loras_in_no_file_promises_no_repetition(host, tmp_path):
    first = merge_loras(None, [Concept(random_lora(host, 1), trigger="a")], "sum").lora
    again = merge_loras(None, [Concept(first, trigger="a")], "sum")
    card = write_card(again.save(tmp_path / "again.safetensors")).read_text()
    assert "It cannot be merged again: merged was made in Python" in card
