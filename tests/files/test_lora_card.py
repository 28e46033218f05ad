"""The card of a merged file, and the notes for LoRA browsers beside it."""

import hashlib
import json

import torch
from oracle import make_lora
from PIL import Image
from safetensors.torch import save_file

from iteris_core import Concept, Lora, merge_loras
from iteris_core.lora_files.metadata import sidecar_phrases, write_sidecar
from iteris_core.report.provenance import write_card

LORA_MANAGER = (
    *("file_name", "model_name", "file_path", "size", "modified", "sha256", "base_model"),
    "preview_url",
)
"""Fields without which it skips a model."""


def test_strengths_that_hold_are_in_the_notes(tmp_path):
    """A user's own stay."""
    file, _ = merged(tmp_path)
    notes = file.with_suffix(".metadata.json")
    metadata = {"strength_min": "0.75", "strength_max": "1.25"}
    write_sidecar(file, {})
    assert "usage_tips" not in json.loads(notes.read_text())
    write_sidecar(file, metadata)
    tips = json.loads(json.loads(notes.read_text())["usage_tips"])
    assert tips == {"strength_min": 0.75, "strength_max": 1.25}
    notes.write_text(json.dumps({"usage_tips": "mine"}))
    write_sidecar(file, metadata)
    assert json.loads(notes.read_text())["usage_tips"] == "mine"


def merged(folder):
    """A file as a merge writes its metadata; one source says under which licence it is."""
    named = {"cat": {"modelspec.license": "CC-BY-4.0"}, "a_dog": {}}
    concepts = [
        Concept(Lora(make_lora(seed).sites, name, metadata, sha256="ab" * 32), None, word, name)
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
    card, sidecar = write_card(file, report)
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
    for written in (text, sidecar.read_text()):
        assert str(tmp_path) not in written


def test_the_verdict_comes_from_the_report(tmp_path):
    from oracle import ModuleHost, Net, make_data

    concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]
    result = merge_loras(ModuleHost(Net(), make_data(2)), concepts)
    file = tmp_path / "merged.safetensors"
    save_file({"x": torch.zeros(1)}, file, dict(result.lora.metadata))
    text = write_card(file, result.report)[0].read_text()
    assert result.report.verdict() in text


def test_lora_manager_finds_its_fields_and_a_person_s_notes_stay(tmp_path):
    file, _ = merged(tmp_path)
    sidecar = write_card(file)[1]
    found = json.loads(sidecar.read_text())
    assert set(LORA_MANAGER) <= set(found)
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["file_path"] == file.name
    assert sidecar_phrases(file).phrases == ("sk`s0 cat", "sk`s1 a_dog")
    own = {**found, "notes": "mine", "favorite": True, "model_name": "A name", "sha256": "old"}
    own["civitai"] = {"id": 3, "trainedWords": ["old"]}
    sidecar.write_text(json.dumps(own))
    write_card(file)
    again = json.loads(sidecar.read_text())
    assert (again["notes"], again["favorite"], again["model_name"]) == ("mine", True, "A name")
    assert again["civitai"]["id"] == 3
    assert again["civitai"]["trainedWords"] == ["sk`s0 cat", "sk`s1 a_dog"]
    assert again["sha256"] == found["sha256"]


def test_any_file_and_any_sidecar(tmp_path):
    file = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, file, {"iteris": '{"concepts": 3, "settings": []}'})
    (tmp_path / "other.metadata.json").write_text("no JSON")
    card, sidecar = write_card(file)
    assert card.read_text().startswith("---\n")
    assert json.loads(sidecar.read_text())["base_model"] == "Unknown"
