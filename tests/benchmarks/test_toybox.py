"""The toybox: its files exist and are small, and its instruments and images are good."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import toybox
from toybox import draw

ALL = {**toybox.concepts(), **toybox.pivotal_concepts()}
LIMIT = 25_000_000
SITES = 56 + 12  # attention projections of the UNet and of the text encoder


@pytest.fixture(scope="module")
def judge():
    return toybox.load_judge()


def drawn(count: int, two: float, seed: int = 3):
    rng = np.random.default_rng(seed)
    scenes = [draw.random_scene(rng, 0.6, two) for _ in range(count)]
    return scenes, [draw.draw(scene, rng) for scene in scenes]


def test_its_files_are_small_and_safe():
    files = [p for p in toybox.ROOT.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert sum(p.stat().st_size for p in files) <= LIMIT
    assert not [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]


def test_a_concept_has_its_files_and_its_lora_names_its_words():
    assert list(toybox.concepts()) == [f"sks{i}" for i in range(1, 11)]
    for token, concept in ALL.items():
        assert concept.instance_prompt == f"a {token} {concept.class_word}"
        assert 5 <= len(concept.references) <= 6
        assert Image.open(concept.references[0]).size == (64, 64)
        assert (concept.embedding is not None) == (token in toybox.pivotal_concepts())
        with safe_open(concept.lora, "pt") as file:
            metadata = file.metadata()
        assert f"a {metadata['modelspec.trigger_phrase']}" == concept.instance_prompt


def test_diffusers_loads_its_loras_and_embeddings():
    pipeline = toybox.load_pipeline()
    for token, concept in ALL.items():
        pipeline.load_lora_weights(str(concept.lora), adapter_name="one")
        layers = [
            module
            for model in (pipeline.unet, pipeline.text_encoder)
            for module in model.modules()
            if "one" in getattr(module, "lora_A", ())
        ]
        assert len(layers) == SITES
        assert {m.r["one"] for m in layers} == {8}
        assert all(m.lora_B["one"].weight.abs().max() > 0 for m in layers)
        pipeline.unload_lora_weights()
        if concept.embedding is not None:
            pipeline.load_textual_inversion(str(concept.embedding), token=token)
            assert len(pipeline.tokenizer(token).input_ids) == 3


def test_the_judge_reads_drawn_pictures_and_their_halves(judge):
    scenes, pictures = drawn(200, two=0.0)
    right = [
        (*a.matches(s.placed[0].thing), a.background == s.background)
        for a, s in zip(judge.read(pictures), scenes, strict=True)
    ]
    assert np.mean(right) >= 0.97
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
    for seed in range(2):
        scenes, pictures = drawn(32, two=0.4, seed=seed)
        with torch.no_grad():
            image = model.encode_image(torch.stack([preprocess(p) for p in pictures]))
            text = model.encode_text(
                tokenizer([draw.caption(s, None, draw.describe) for s in scenes])
            )
        image = torch.nn.functional.normalize(image, dim=-1)
        right += ((text @ image.T).argmax(dim=1) == torch.arange(32)).tolist()
    assert np.mean(right) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("token", ["sks1", "sks6", *toybox.pivotal_concepts()])
def test_a_concept_is_drawn_with_its_own_lora(token, judge):
    from toybox.evaluate import load_concept, measure_concept

    pipeline = toybox.load_pipeline()
    load_concept(pipeline, ALL[token])
    assert measure_concept(pipeline, judge, ALL[token], 20)["attributes"] >= 0.9


@pytest.mark.slow
def test_the_base_meets_its_marks(judge):
    from toybox.evaluate import measure_base

    figures = measure_base(toybox.load_pipeline(), judge, 48)
    assert figures["one_shape_color_background"] >= 0.93
    assert figures["two_both_shapes"] >= 0.78
