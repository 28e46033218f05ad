"""Worlds of concepts beside the toybox's own: training that resumes, words that are new, and whose
LoRA draws what."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.emoji.tokenizer import clip_tokenizer, tokens, word_tokenizer
from benchmarks.emoji.train import base
from benchmarks.emoji.train.optimizers import optimizers, steady
from toybox.train.common import Average, Run

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import minilm
import styles
from minilm import words
from minilm.prompts import prompts, templates, words_of
from protocol.toybox import ToyboxWorld
from styles.reader import STYLES


def test_a_training_of_emoji_goes_on_bit_for_bit(tmp_path):
    tokenizers = clip_tokenizer(tmp_path / "tokenizer"), word_tokenizer()

    def train(folder: Path, until: int) -> Run:
        torch.manual_seed(0)
        models = base.new_models(tokenizers, double=1, single=1, heads=1)
        made = optimizers(models["transformer"], [models["clip"], models["t5"]])
        average = Average(list(models.values()), 0.9)
        run = Run(folder, models, made, average, 4, 1e-2, 5, steady)
        for step in range(run.start, until):
            _, generator = run.generators(step)
            latents = torch.randn(4, 64, 16, generator=generator)
            captions = tokens(tokenizers, ["a cat face on a red background"] * 4)
            run.descend(step, base.velocity_loss(models, latents, captions, generator))
        run.save(until)
        return run

    whole = train(tmp_path / "whole", 4)
    train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts", 4)
    assert parts.start == 2
    for name, model in whole.modules.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, parts.modules[name].state_dict()[key]), (name, key)
    for one, other in zip(whole.average.shadow, parts.average.shadow, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["contexts", "new"])
def test_new_prompts_of_minilm_have_no_word_of_a_template(kind):
    of_templates = words_of(" ".join(templates())) - words.SMALL
    for concept in minilm.concepts().values():
        found = prompts(concept, kind, 20)
        assert found == prompts(concept, kind, 20)
        named = f"{concept.token} {concept.class_word}"
        for prompt in found:
            assert named in prompt.text
            assert not (words_of(prompt.text) - words_of(named)) & of_templates


def test_styles_are_learned_and_can_be_read():
    """Of drawn pictures, and of those of each LoRA."""
    quality = json.loads((styles.ROOT / "weights" / "quality.json").read_text())
    assert set(quality["reader"]) == set(STYLES)
    assert min(of["style"] for of in quality["reader"].values()) > 0.95
    assert set(quality["read_as_theirs"]) == set(styles.styles())
    for shares in quality["read_as_theirs"].values():
        assert shares["with"] >= 0.6
        assert shares["without"] < 0.2


def test_halves_of_one_prompt_and_one_lora_are_the_whole_picture():
    world = ToyboxWorld()
    (wanted, other) = world.rows(("sks1", "sks4"), 2, 1)
    left, right = world.prompts_of_regions([wanted, other])
    background = wanted.prompt.partition(" on a ")[2]
    assert left[0] == f"a sks1 star left of a sks1 star on a {background}"
    assert right[0] == f"a sks4 circle left of a sks4 circle on a {background}"
    (concept,) = world.concepts(("sks1",), 0)
    (whole,) = world.draw(concept.lora, [wanted])
    half = (concept.lora, [wanted.prompt])
    (halves,) = world.draw_row([half, half], [wanted])
    assert max(abs(a - b) for a, b in zip(whole.tobytes(), halves.tobytes(), strict=True)) <= 1
    (mixed,) = world.draw_row([half, (None, [wanted.prompt])], [wanted])
    assert mixed.tobytes() != whole.tobytes()
