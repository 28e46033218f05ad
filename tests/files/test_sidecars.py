"""Trigger words beside a LoRA file, and the precedence of sources."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from iteris_core import IterisError, Lora, LowRank, write_lora
from iteris_core.lora_files import read_tensors
from iteris_core.lora_files.embeddings import split_embeddings
from iteris_core.lora_files.metadata import find_phrases

SIDECARS = {
    "toy.metadata.json": {"civitai": {"trainedWords": ["sks cat", "red hat, sks"]}},
    "toy.civitai.info": {"id": 3, "trainedWords": ["sks cat", "red hat, sks"]},
    "toy.safetensors.rgthree-info.json": {
        "trainedWords": [{"word": "sks cat", "civitai": True}, {"word": " red hat, sks,"}]
    },
}
TAGS = ["1girl", "1boy, solo", "2girls", "6+boys", "looking at viewer", "smile", "very long hair",
        "highres", "simple_background", "white background", "realistic", "score_9"]  # fmt: skip


@pytest.mark.parametrize("name", SIDECARS)
def test_words_of_every_helper(tmp_path, name):
    (tmp_path / name).write_text(json.dumps(SIDECARS[name]))
    phrases, source = find_phrases(tmp_path / "toy.safetensors", {})
    assert phrases == ("sks cat", "red hat, sks")
    assert name.endswith(source)


@pytest.mark.parametrize("text", ["", "no JSON", "[1]", "{}", '{"trainedWords": 7}',
                                  '{"trainedWords": [1, null, {"word": 3}, ""]}',
                                  '{"civitai": []}', "[" * 100_000])  # fmt: skip
def test_any_text_may_stand_there(tmp_path, text):
    (tmp_path / "toy.civitai.info").write_text(text)
    assert find_phrases(tmp_path / "toy.safetensors", {}) == ((), "")


def test_words_of_a1111_are_one_phrase(tmp_path):
    note = {"description": "", "activation text": "<lora:toy:0.8> sks cat, hat", "notes": "x"}
    (tmp_path / "toy.json").write_text(json.dumps(note))
    assert find_phrases(tmp_path / "toy.safetensors", {}) == (("sks cat, hat",), ".json")
    (tmp_path / "toy.civitai.info").write_text(json.dumps(SIDECARS["toy.civitai.info"]))
    assert find_phrases(tmp_path / "toy.safetensors", {})[1] == ".civitai.info"


@pytest.mark.parametrize("tag", TAGS)
def test_a_common_tag_is_no_trigger(tmp_path, tag):
    file = tmp_path / "toy.safetensors"
    counts = json.dumps({"d": {tag: 90, "mychar": 80, "hat": 5}})
    assert find_phrases(file, {"ss_tag_frequency": counts}) == (("mychar",), "captions")
    assert find_phrases(file, {"ss_tag_frequency": json.dumps({"d": {tag: 9}})})[0] == ()
    said = {"modelspec.trigger_phrase": f"{tag}, mychar"}
    assert find_phrases(file, said) == (("mychar",), "file")
    words = {"trainedWords": ["<lora:foo:1>", tag, f"{tag}, mychar,  red hair"]}
    (tmp_path / "toy.civitai.info").write_text(json.dumps(words))
    assert find_phrases(file, {}) == (("mychar, red hair",), ".civitai.info")


@pytest.mark.parametrize(
    ("folder", "phrases"),
    [("10_sks dog", ("sks dog",)), ("1_anime style", ()), ("5_woman", ()), ("3_ohwx", ("ohwx",)),
     ("img", ())],
)  # fmt: skip
def test_a_folder_of_common_words_is_no_trigger(folder, phrases):
    metadata = {"ss_dataset_dirs": json.dumps({folder: {"n_repeats": 1}})}
    assert find_phrases(Path("none.safetensors"), metadata)[0] == phrases


def test_what_the_file_says_comes_first_and_a_guess_last(tmp_path):
    file = tmp_path / "toy.safetensors"
    guess = {"ss_dataset_dirs": json.dumps({"10_zwx dog": {}})}
    said = {**guess, "modelspec.trigger_phrase": "abc, def ghi"}
    assert find_phrases(file, {}) == ((), "")
    assert find_phrases(file, guess) == (("zwx dog",), "captions")
    (tmp_path / "toy.civitai.info").write_text(json.dumps({"trainedWords": ["sks cat"]}))
    assert find_phrases(file, guess) == (("sks cat",), ".civitai.info")
    assert find_phrases(file, said) == (("abc", "def ghi"), "file")


def test_a_lora_with_embeddings_is_read_from_a_folder_that_is_read_only(tmp_path, monkeypatch):
    site = "unet.mid_block.attentions.0.to_q"
    lora = Lora(
        {site: LowRank(torch.ones(4, 1), torch.ones(1, 4))},
        metadata={"iteris": json.dumps({"embeddings": ["word"]})},
        embeddings={"word": {"clip_l": torch.ones(1, 4)}},
    )
    path = write_lora(lora, tmp_path / "merged.safetensors")

    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    embeddings, _, missing = split_embeddings(path, *read_tensors(path))
    assert (list(embeddings), missing) == (["word"], [])
    with pytest.raises(IterisError, match="Read-only"):
        write_lora(lora, path, overwrite=True)
