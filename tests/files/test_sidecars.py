"""Trigger words beside a LoRA file, and the precedence of sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iteris_core.lora_files.sidecars import find_phrases, sidecar_phrases

SIDECARS = {
    "toy.metadata.json": {"civitai": {"trainedWords": ["sks cat", "red hat, sks"]}},
    "toy.civitai.info": {"id": 3, "trainedWords": ["sks cat", "red hat, sks"]},
    "toy.safetensors.rgthree-info.json": {
        "trainedWords": [{"word": "sks cat", "civitai": True}, {"word": " red hat, sks,"}]
    },
}


@pytest.mark.parametrize("name", SIDECARS)
def test_words_of_every_helper(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(SIDECARS[name]))
    found = sidecar_phrases(tmp_path / "toy.safetensors")
    assert found.phrases == ("sks cat", "red hat, sks")
    assert name.endswith(found.source)


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", "{}", '{"trainedWords": 7}',
                                  '{"trainedWords": [1, null, {"word": 3}, ""]}',
                                  '{"civitai": []}', "[" * 100_000])  # fmt: skip
def test_any_text_may_stand_there(tmp_path: Path, text: str) -> None:
    (tmp_path / "toy.civitai.info").write_text(text)
    assert sidecar_phrases(tmp_path / "toy.safetensors") == ((), "")


def test_what_the_file_says_comes_first_and_a_guess_last(tmp_path: Path) -> None:
    file = tmp_path / "toy.safetensors"
    guess = {"ss_dataset_dirs": json.dumps({"10_zwx dog": {}})}
    said = {**guess, "modelspec.trigger_phrase": "abc, def ghi"}
    assert find_phrases(file, {}) == ((), "")
    assert find_phrases(file, guess) == (("zwx dog",), "captions")
    (tmp_path / "toy.civitai.info").write_text(json.dumps({"trainedWords": ["sks cat"]}))
    assert find_phrases(file, guess) == (("sks cat",), ".civitai.info")
    assert find_phrases(file, said) == (("abc", "def ghi"), "file")
