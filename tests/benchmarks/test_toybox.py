"""The toybox: its files exist and are small, and its instruments and images are good."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import toybox
from toybox import draw

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
safetensors = pytest.importorskip("safetensors")

LIMIT = 25_000_000
SITES = 56 + 12  # attention projections of the UNet and of the text encoder
ALL = {**toybox.concepts(), **toybox.pivotal_concepts()}
ENTRIES = {
    e["token"]: e
    for kind in ("concepts", "pivotal_concepts")
    for e in json.loads((toybox.ROOT / "world.json").read_text(encoding="utf-8"))[kind]
}


@pytest.fixture(scope="module")
def pipeline():
    return toybox.load_pipeline()


@pytest.fixture(scope="module")
def judge():
    return toybox.load_judge()


def drawn(count: int, two: float, seed: int = 3):
    rng = np.random.default_rng(seed)
    scenes = [draw.random_scene(rng, 0.6, two) for _ in range(count)]
    return scenes, [draw.draw(scene, rng) for scene in scenes]


def test_importing_needs_no_torch():
    code = "import sys, toybox; toybox.concepts(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=toybox.ROOT.parent)


def test_size_stays_within_the_limit():
    files = [p for p in toybox.ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= LIMIT


def test_weights_are_safetensors_only():
    assert not [p for p in toybox.ROOT.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_drawing_is_deterministic():
    first, second = drawn(12, 0.5)[1], drawn(12, 0.5)[1]
    assert [np.array(p).tobytes() for p in first] == [np.array(p).tobytes() for p in second]
    assert drawn(12, 0.5, seed=4)[1][0].tobytes() != first[0].tobytes()


def test_there_are_ten_concepts_of_which_several_share_a_class():
    assert list(toybox.concepts()) == [f"sks{i}" for i in range(1, 11)]
    classes = [c.class_word for c in toybox.concepts().values()]
    assert classes.count("star") >= 3
    assert sum(classes.count(c) >= 2 for c in set(classes)) >= 3
    assert len({c.description for c in ALL.values()}) == 12


@pytest.mark.parametrize("token", list(ALL))
def test_a_concept_has_its_files(token):
    concept = ALL[token]
    assert concept.instance_prompt == f"a {token} {concept.class_word}"
    assert 5 <= len(concept.references) <= 6
    assert Image.open(concept.references[0]).size == (64, 64)
    assert (concept.embedding is not None) == (token in toybox.pivotal_concepts())


@pytest.mark.parametrize("token", list(ALL))
def test_a_lora_names_its_words_and_its_base(token):
    with safetensors.safe_open(ALL[token].lora, "pt") as file:
        metadata = file.metadata()
    assert f"a {metadata['modelspec.trigger_phrase']}" == ALL[token].instance_prompt
    assert metadata["ss_sd_model_name"] == "toybox"


def test_noting_words_leaves_the_tensors_as_they_are(tmp_path):
    pytest.importorskip("peft")
    from safetensors.torch import load_file, save_file

    from toybox.train.lora_files import note_words

    file = tmp_path / "a.safetensors"
    tensors = {"a.alpha": torch.tensor(4.0), "a.lora_down.weight": torch.randn(2, 3).half()}
    save_file(tensors, file, {"kept": "as it is"})
    note_words(file, {"token": "sks", "class_word": "star"})
    with safetensors.safe_open(file, "pt") as opened:
        assert opened.metadata() == {
            "kept": "as it is",
            "modelspec.trigger_phrase": "sks star",
            "ss_sd_model_name": "toybox",
        }
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("token", list(ALL))
def test_a_lora_has_its_rank_and_alpha(token, pipeline):
    entry = ENTRIES[token]
    pipeline.load_lora_weights(str(ALL[token].lora), adapter_name="one")
    try:
        layers = [
            m
            for model in (pipeline.unet, pipeline.text_encoder)
            for m in model.modules()
            if hasattr(m, "lora_A") and "one" in m.lora_A
        ]
        assert len(layers) == SITES
        assert {m.r["one"] for m in layers} == {8}
        assert {m.scaling["one"] for m in layers} == {entry["alpha"] / 8}
        assert all(m.lora_B["one"].weight.abs().max() > 0 for m in layers)
    finally:
        pipeline.unload_lora_weights()


def test_words_and_rare_tokens_are_single_tokens(pipeline):
    from toybox.tokenizer import RARE, WORDS

    assert not [w for w in (*WORDS, *RARE) if len(pipeline.tokenizer(w).input_ids) != 3]
    assert pipeline.tokenizer.decode(
        pipeline.tokenizer("a zebra, dancing").input_ids, skip_special_tokens=True
    ).split() == ["a", "zebra", ",", "dancing"]


def test_an_embedding_loads_as_textual_inversion():
    pipeline = toybox.load_pipeline()
    for token, concept in toybox.pivotal_concepts().items():
        pipeline.load_textual_inversion(str(concept.embedding), token=token)
        assert len(pipeline.tokenizer(token).input_ids) == 3


def test_the_judge_reads_drawn_pictures(judge):
    scenes, pictures = drawn(200, two=0.0)
    read = judge.read(pictures)
    right = [
        (*a.matches(s.placed[0].thing), a.background == s.background)
        for a, s in zip(read, scenes, strict=True)
    ]
    assert np.mean(right) >= 0.97


def test_the_judge_reads_halves(judge):
    scenes, pictures = drawn(100, two=1.0)
    right = [
        a.matches(p.thing)
        for pair, s in zip(judge.read_halves(pictures), scenes, strict=True)
        for a, p in zip(pair, s.placed, strict=True)
    ]
    assert np.mean(right) >= 0.95


def test_clip_retrieves_drawn_pictures():
    pytest.importorskip("open_clip")
    model, preprocess, tokenizer = toybox.load_clip()
    right = []
    for seed in range(4):
        scenes, pictures = drawn(32, two=0.4, seed=seed)
        with torch.no_grad():
            image = model.encode_image(torch.stack([preprocess(p) for p in pictures]))
            text = model.encode_text(
                tokenizer([draw.caption(s, None, draw.describe) for s in scenes])
            )
        image = torch.nn.functional.normalize(image, dim=-1)
        right += ((text @ image.T).argmax(dim=1) == torch.arange(32)).tolist()
    assert np.mean(right) >= 0.9


def test_the_base_draws_what_it_is_asked_for(pipeline, judge):
    from toybox.evaluate import sample

    wanted = [
        ("star", "red", "blue"),
        ("circle", "green", "white"),
        ("square", "purple", "gray"),
        ("triangle", "blue", "yellow"),
        ("ring", "cyan", "black"),
        ("cross", "pink", "green"),
        ("star", "yellow", "white"),
        ("square", "black", "pink"),
    ]
    images = sample(pipeline, [f"a {c} {s} on a {b} background" for s, c, b in wanted], seed=1)
    right = [
        (a.shape, a.color1, a.background) == w
        for a, w in zip(judge.read(images), wanted, strict=True)
    ]
    assert sum(right) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("token", list(ALL))
def test_a_concept_is_drawn_with_its_own_lora(token, judge):
    from toybox.evaluate import load_concept, measure_concept

    pipeline = toybox.load_pipeline()
    load_concept(pipeline, ALL[token])
    assert measure_concept(pipeline, judge, ALL[token], 20)["attributes"] >= 0.9


@pytest.mark.slow
def test_the_base_meets_its_marks(pipeline, judge):
    from toybox.evaluate import measure_base

    figures = measure_base(pipeline, judge, 96)
    assert figures["one_shape_color_background"] >= 0.93
    assert figures["two_both_shapes"] >= 0.78
