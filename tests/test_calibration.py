from __future__ import annotations

import pytest
import torch

from iteris_core import Calibration, Concept, IterisError, Lora, SettingsError
from iteris_core.concepts import KINDS, TEMPLATES, Words, concept_prompts, words_of
from iteris_core.hosts.rows import row_texts


def prompts(concept, **kwargs):
    return concept_prompts(concept, Calibration(**kwargs), torch.Generator().manual_seed(0))


def test_prompts_from_trigger_and_class_word():
    made = prompts(Concept(Lora({}), trigger="sks", class_word="dog"), samples=50)
    assert len(made) == 50
    assert all("sks dog" in prompt for prompt in made)
    assert set(made) == {template.format("sks dog") for template in TEMPLATES}
    only_class = prompts(Concept(None, class_word="dog"), samples=3, templates=["a {}"])
    assert only_class == ["a dog"] * 3


def test_own_prompts_are_used_as_they_are_and_evenly():
    made = prompts(Concept(None, prompts=["a", "b", "c"]), samples=7)
    assert sorted(made.count(p) for p in "abc") == [2, 2, 3]
    assert prompts(Concept(None, prompts=[""]), samples=2) == ["", ""]


def test_every_phrase_has_its_turn():
    concept = Concept(Lora({}), subjects=["sks cat", "zwx dog", "abc bird"])
    made = prompts(concept, samples=31)
    assert [sum(phrase in prompt for prompt in made) for phrase in concept.subjects] == [11, 10, 10]
    assert [next(i for i, s in enumerate(concept.subjects) if s in p) for p in made[:6]] == [
        0, 1, 2, 0, 1, 2,
    ]  # fmt: skip
    assert concept.subject == "sks cat and zwx dog and abc bird"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "sks cat, zwx dog"}, Words(subjects=("sks cat", "zwx dog"))),
        ({"modelspec.trigger_phrase": "sks cat"}, Words("sks", "cat")),
        ({"ss_dataset_dirs": '{"10_sks big dog": {"n_repeats": 10}}'}, Words("sks", "big dog")),
        ({"iteris": '{"concepts": [3, {"lora": null, "trigger": "preserve"}]}'}, Words()),
        (
            {
                "modelspec.trigger_phrase": "sks, zwx",
                "iteris": '{"concepts": [{"lora": "a", "trigger": "sks", "class": "cat"}, '
                '{"lora": "b", "subjects": ["zwx dog", "a b"]}, {"lora": null, "trigger": "k"}]}',
            },
            Words(subjects=("sks cat", "zwx dog", "a b")),
        ),
        ({}, Words()),
    ],
)
def test_the_words_of_a_file(metadata, words):
    assert words_of(metadata) == words


def test_no_prompts_are_errors():
    with pytest.raises(IterisError, match="empty prompt list"):
        prompts(Concept(None, prompts=[]))
    with pytest.raises(IterisError, match="neither prompts nor a trigger"):
        prompts(Concept(Lora({}, "cat")))


@pytest.mark.parametrize(
    "settings",
    [
        {"samples": 0},
        {"timesteps": 11},
        {"empty_share": 1.0},
        {"latents": "pictures"},
        {"templates": ["a dog"]},
        {"templates": []},
        {"latent_size": 0},
    ],
)
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(SettingsError):
        Calibration(**settings)


@pytest.mark.parametrize("weight", [-1, float("inf"), float("nan")])
def test_a_weight_that_cannot_be_is_an_error(weight):
    with pytest.raises(SettingsError, match="weight must be 0 or more and finite"):
        Concept(None, prompts=["a"], weight=weight)


@pytest.mark.parametrize("name", ["strength", "text_strength"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_strength_that_is_not_finite_is_an_error(name, value):
    with pytest.raises(SettingsError, match=f"sks: {name} must be finite"):
        Concept(None, trigger="sks", **{name: value})


@pytest.mark.parametrize("kind", ["subject", "style", "tags", "video"])
def test_every_kind_has_templates_of_its_own(kind):
    concept = Concept(None, trigger="sks, {red} hair", kind=kind)
    calibration = Calibration(samples=40)
    made = concept_prompts(concept, calibration, torch.Generator().manual_seed(0))
    assert set(made) == {template.replace("{}", "sks, {red} hair") for template in KINDS[kind]}
    assert len(set(KINDS[kind])) == 40
    assert all(template.count("{}") == 1 for template in KINDS[kind])


def test_an_unknown_kind_is_refused():
    with pytest.raises(SettingsError, match="kind must be one of subject, style"):
        Concept(None, trigger="sks", kind="photo")


def said(rows):
    return [rows.texts[row] for row in rows.text_rows]


def test_no_concept_has_only_empty_prompts():
    """With a row or two a concept, a fifth of them would have none of its words."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        assert said(row_texts([0, 1, 2], ["a", "b", "c"], 1, 0.5, generator)) == ["a", "b", "c"]
        rows = row_texts([0, 0, 1, 1], ["a", "b", "c", "d"], 2, 0.9, generator)
        assert set(said(rows)[:4]) & {"a", "b"}
        assert set(said(rows)[4:]) & {"c", "d"}


def test_a_share_of_the_rows_has_the_empty_prompt():
    generator = torch.Generator().manual_seed(0)
    rows = said(row_texts([0] * 500, ["a"] * 500, 2, 0.2, generator))
    assert rows.count("") / len(rows) == pytest.approx(0.2, abs=0.04)
