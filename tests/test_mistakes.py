"""What a user gets wrong on the command line or in Python is one clear line, before any work."""

from __future__ import annotations

import pytest

from iteris_core import Concept, IterisError, Lora
from iteris_core.cli.concept_options import parse_concept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.safetensors:sks:star,wieght=2", "no key 'wieght'; did you mean 'weight'"),
        ("a.safetensors:sks:star,weight=2,colour=red", "no key 'colour'. The keys are"),
        ("file=a.safetensors,trigger=sks,clas=cat", "no key 'clas'; did you mean 'class'"),
        ("a.safetensors:sks:star:abc", "strength must be a number .*, not 'abc'"),
        ("a.safetensors:sks:star:nan", "strength must be a number .*, not 'nan'"),
        ("a.safetensors:sks:star:1:2", "strength must be a number .*, not '1:2'"),
        ("a.safetensors:sks,weight=2", "is not FILE:TRIGGER:CLASS"),
    ],
)
def test_a_slip_in_a_concept_is_named(text, message):
    with pytest.raises(IterisError, match=message):
        parse_concept(text)


def test_a_blank_before_a_key_does_not_make_it_a_part_of_the_class():
    option = parse_concept("a.safetensors:sks:star, weight=2")
    assert (option.class_word, option.weight) == ("star", 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": "a sks star"}, r"sks: prompts must be a list .*=\['a sks star'\]"),
        ({"subjects": "sks star"}, "sks: subjects must be a list"),
        ({"strength": "1"}, "sks: strength must be a number, not '1'"),
        ({"weight": None}, "sks: weight must be a number, not None"),
        ({"lora": "cat.safetensors"}, r"host.read_lora\('cat.safetensors'\)"),
    ],
)
def test_a_concept_of_the_wrong_types_is_refused(values, message):
    with pytest.raises(IterisError, match=message):
        Concept(**{"lora": Lora({}), "trigger": "sks", **values})
