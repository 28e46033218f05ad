from dataclasses import replace

import pytest
import torch

from iteris_core import Calibration, Concept, IterisError, Lora
from iteris_core.activations.rows import Row
from iteris_core.calibration import TEMPLATES, over
from iteris_core.calibration_prompts import (
    Wording,
    calling_words,
    concept_prompts,
    is_held_out,
    whole_words,
)
from iteris_core.concepts import words_in
from iteris_core.errors import ConceptError
from iteris_core.hosts.protocol import SampleRequest
from iteris_core.hosts.rows import SamplePrompts, added_concepts
from iteris_core.methods.registry import settings_over


def prompts(concept, **kwargs):
    return concept_prompts(concept, Calibration(**kwargs), torch.Generator().manual_seed(0))


def test_prompts_from_trigger_and_class_word():
    made = prompts(Concept(Lora({}), trigger="sks", class_word="dog"), samples=50)
    assert len(made) == 50
    assert all("sks dog" in prompt for prompt in made)
    assert set(made) == {template.format("sks dog") for template in TEMPLATES}
    only_class = prompts(Concept(None, class_word="dog"), samples=3, templates=["a {}"])
    assert only_class == ["a dog"] * 3


def test_every_phrase_has_rows_of_its_own():
    """Also of more phrases than samples, and whichever rows get the empty prompt."""
    many = Concept(Lora({}), subjects=[f"sks{n} cat" for n in range(20)])
    concepts = [many, Concept(Lora({}), trigger="zwx", class_word="dog")]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        calibration = Calibration(samples=12)
        request = SampleRequest(concepts, calibration, None, generator, None)
        drawn = SamplePrompts.drawn(request, WORDS, 0.5)
        assert [drawn.owners.count(owner) for owner in range(2)] == [20, 12]
        texts = said(drawn.rows(2))
        assert all(any(phrase in text for text in texts) for phrase in many.phrases)


@pytest.mark.parametrize(
    ("phrase", "words"),
    [
        ("sks dog", ("sks", "dog", ())),
        ("a sks dog", ("sks", "dog", ())),
        ("The Sks big dog", ("Sks", "big dog", ())),
        ("a photo of a sks dog", ("sks", "dog", ())),
        ("<s0><s1> cat", ("<s0><s1>", "cat", ())),
        ("zwx style", ("zwx", "style", ())),
        ("big sks dog", ("sks", "", ("big sks dog",))),
        ("in the style of zwx", ("zwx", "", ("in the style of zwx",))),
        ("anime style", ("anime style", "", ())),
        ("a red hat", ("red hat", "", ())),
        ("a", ("a", "", ())),
    ],
)
def test_the_trigger_of_a_phrase_is_its_first_word_that_is_not_common(phrase, words):
    found = words_in([phrase])
    assert tuple(found.values()) == words
    concept = Concept(Lora({}), **found)
    assert calling_words([concept]) == set(words[0].lower().split())
    assert " ".join(concept.phrases) in phrase


def test_no_prompts_are_errors():
    with pytest.raises(IterisError, match="empty prompt list"):
        prompts(Concept(None, prompts=[]))
    said = r"has no trigger word and no prompts.*always_on='include'"
    with pytest.raises(IterisError, match=said):
        prompts(Concept(Lora({}, "cat")))


@pytest.mark.parametrize("name", ["strength", "text_strength"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_strength_that_is_not_finite_is_an_error(name, value):
    said = f"sks: {name}: Input should be a finite number, not {value}"
    with pytest.raises(ConceptError, match=said):
        Concept(None, trigger="sks", **{name: value})


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConceptError, match="sks: kind: Input should be 'subject', 'style', 'tags'"):
        Concept(None, trigger="sks", kind="photo")


WORDS = ["apple", "bridge", "cloud", "sks", "zwx"]
PAIR = [
    Concept(Lora({}), trigger="sks", class_word="dog"),
    Concept(Lora({}), trigger="zwx", class_word="cat"),
]


def said(rows):
    return [row.prompt for row in rows]


def texts(owners, prompts, count, empty, generator, concepts=None, contexts=0.0):
    """Rows of concepts with LoRAs, as many as there are owners."""
    concepts = concepts or [Concept(Lora({}), trigger=f"t{owner}") for owner in set(owners)]
    calibration, wording = Calibration(contexts=contexts), Wording(WORDS, concepts, generator)
    request = SampleRequest(concepts, calibration, None, generator, None)
    return SamplePrompts(request, owners, prompts, wording, empty_share=empty).rows(count)


def test_no_concept_has_only_empty_prompts():
    """With a row or two a concept, a fifth of them would have none of its words."""
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        assert said(texts([0, 1, 2], ["a", "b", "c"], 1, 0.5, generator)) == ["a", "b", "c"]
        rows = texts([0, 0, 1, 1], ["a", "b", "c", "d"], 2, 0.9, generator)
        assert set(said(rows)[:4]) & {"a", "b"}
        assert set(said(rows)[4:]) & {"c", "d"}


def test_a_share_of_the_rows_carries_further_words():
    generator = torch.Generator().manual_seed(0)
    rows = said(texts([0] * 400, ["a sks dog"] * 400, 1, 0.2, generator, PAIR[:1], contexts=0.5))
    more = [text for text in rows if text not in ("", "a sks dog")]
    assert len(more) / sum(map(bool, rows)) == pytest.approx(0.5, abs=0.06)
    assert len(set(more)) > 70
    assert all("a sks dog" in text and text.count("sks") == 1 for text in more)


def test_many_loras_share_their_prompts():
    """And what is settled again stays as it is, as when a recipe is run again."""

    def shared(loras: int, **given) -> int:
        calibration = Calibration(**given).settled(loras, pictures=True)
        assert calibration.settled(loras, pictures=True) == calibration
        return calibration.samples

    assert [shared(loras) for loras in (1, 4, 5, 8, 20)] == [80, 80, 80, 50, 20]
    assert [shared(8, samples=9), shared(8, total_samples=None)] == [9, 80]
    assert Calibration().settled(8, pictures=False).samples == 80
    assert settings_over("default", "iteris", None, {"samples": 60})[1].total_samples is None
    assert over({"samples": 25, "total_samples": 200}, {"samples": 60})["total_samples"] is None
    assert settings_over("fast", "iteris", None, {"seed": 1})[1].total_samples == 128


def test_rows_without_a_lora_have_latents_of_others():
    """As many as two fifths of a concept's rows, on the prompts that it was given, in turn."""
    generator = torch.Generator().manual_seed(0)
    concepts = [PAIR[0], Concept.preserve(["x", "y", "z"]), PAIR[1]]
    rows = texts([0] * 5 + [2] * 5, ["a sks dog"] * 5 + ["a zwx cat"] * 5, 3, 0.0, generator,
                 concepts)  # fmt: skip
    assert [row.concept for row in rows] == [0] * 15 + [1] * 6 + [2] * 15
    assert sorted(said(rows)[15:21]) == ["x", "x", "y", "y", "z", "z"]
    assert [row.latent for row in rows if row.concept != 1] == list(range(30))
    assert all(0 <= row.latent < 30 for row in rows)
    assert [row.number for row in rows] == list(range(36))


def test_generic_prompts_name_no_concept():
    (concept,) = added_concepts(PAIR, Calibration(), [*WORDS, "garden"])
    assert concept is not None
    assert (concept.lora, concept.weight, len(concept.prompts)) == (None, 0.2, 128)
    words = {word for prompt in concept.prompts for word in prompt.split()}
    assert {"apple", "bridge", "garden"} <= words
    assert not any(map(is_held_out, words))
    assert not words & {"sks", "zwx"}
    (again,) = added_concepts(PAIR, Calibration(), [*WORDS, "garden"])
    assert again.prompts == concept.prompts
    assert not added_concepts(PAIR, Calibration(generic=0), WORDS)
    assert not added_concepts(PAIR[:1], Calibration(), WORDS)  # nothing to tell apart
    everywhere = Concept(Lora({}), prompts=["a dog", "the sea"])
    assert not added_concepts([*PAIR, everywhere], Calibration(), WORDS)


def test_class_words_alone_keep_one_lora_to_its_trigger():
    calibration = Calibration(class_words=0.5, templates=["a {}", "a {} in the snow"])
    generic, classes = added_concepts(PAIR[:1], calibration, WORDS)
    assert generic.weight == 0.2
    assert (classes.lora, classes.weight, len(classes.prompts)) == (None, 0.5, 4)
    assert {"a dog", "a dog in the snow"} < set(classes.prompts)
    assert all("dog" in prompt and "sks" not in prompt for prompt in classes.prompts)
    assert len(added_concepts(PAIR, calibration, WORDS)[1].prompts) == 8
    wordless = replace(PAIR[0], class_word="")
    assert len(added_concepts([wordless], calibration, WORDS)) == 1


@pytest.mark.parametrize(
    "pieces",
    [
        ["dog</w>", "ca", "cat</w>", "x</w>", "7up</w>", "<|endoftext|>"],
        ["▁Dog", "s", "▁cat", "▁", "▁a"],
        ["Ġdog", "ogs", "Ġcat", "Ġ12"],
        ["dog", "##s", "cat", "[CLS]", "be"],
    ],
)
def test_whole_words_of_a_vocabulary(pieces):
    assert whole_words(pieces) == ["cat", "dog"]


def test_a_long_prompt_gets_no_context():
    """What is too long for a text encoder is cut, with the trigger in it."""
    wording = Wording(WORDS, PAIR, torch.Generator().manual_seed(0))
    prompt = "word " * 31 + "sks dog"
    assert {wording.in_context(prompt) for _ in range(20)} == {prompt}


def test_what_samples_are_worth():
    """A prompt counts twice, with other noise each time; prompts of no concept do not count."""
    concepts = [*PAIR, Concept.preserve(["x"])]
    owners = [0] * 6 + [1] * 6 + [2]
    prompts = ["a", "b", "c", "d", "e", ""] + ["f", "g"] * 3 + ["x"]
    rows = [Row(owner, 0, prompt) for owner, prompt in zip(owners, prompts, strict=True)]

    def worth(samples):
        calibration, generator = Calibration(samples=samples), torch.Generator()
        wording = Wording(WORDS, concepts, generator)
        request = SampleRequest(concepts, calibration, None, generator, None)
        return SamplePrompts(request, [0, 1], ["a", "f"], wording).effective_samples(rows)

    assert worth(50) == 4
    assert worth(3) == 3


def test_held_out_rows_have_words_that_no_row_of_a_fit_has():
    """A tenth of a vocabulary, and of it alone."""
    vocabulary = [f"{a}{b}{c}" for a in "abcdefgh" for b in "aeiou" for c in "klmnprst"]
    words = dict[bool, set[str]]()
    for held_out in (False, True):
        generator = torch.Generator().manual_seed(0)
        wording = Wording(vocabulary, PAIR, generator, held_out=held_out)
        prompts = [wording.in_context("sks") for _ in range(3000)]
        words[held_out] = {word for prompt in prompts for word in prompt.split()} - {"sks"}
    assert words[False] & set(vocabulary) == {w for w in vocabulary if not is_held_out(w)}
    assert words[True] == {word for word in vocabulary if is_held_out(word)}
    assert not words[True] & words[False]
    assert 0.05 < len(words[True]) / len(vocabulary) < 0.15
