"""Compare Merges: the rows that it draws, and at which strengths."""

from dataclasses import replace

import pytest
import torch
from kit import SETTINGS, part


def test_compare_shows_each_lora_alone_and_all_stacked(kit):
    """A speed LoRA is on in every row but the base; minutes and the rank are those of merges."""
    speed = kit.specs.make_spec(kit.loras / "c.safetensors", kind="always on")
    node = kit.node("merge_nodes", "CompareMerges")
    rows = {"row_1": "base", "row_2": "each alone", "row_3": "stacked", "row_5": "average"}
    given = {"settings": {**SETTINGS, "rank": 2}, "minutes": 5.0, "prompt": "a cat", **rows}
    concepts = [replace(kit.concepts()[0], weight=0.5), kit.concepts()[1]]
    models, clips, labels, report, prompts = node.execute(
        kit.model, [*concepts, speed], kit.clip, **given
    ).result
    assert labels == ["base", "a alone", "b alone", "stacked", "average"]
    assert report.startswith("a alone: ")
    assert prompts == ["a cat"] * 5
    assert models[0] is kit.model
    kit.model, kit.clip = kit.stock("c.safetensors")
    wanted = kit.draw(*kit.stock("a.safetensors"))
    assert float((kit.draw(models[1], clips[1]) - wanted).norm() / wanted.norm()) < 1e-2
    kit.model, kit.clip = kit.stock("a.safetensors")
    wanted = kit.draw(*kit.stock("b.safetensors", 0.7))
    assert float((kit.draw(models[3], clips[3]) - wanted).norm() / wanted.norm()) < 1e-2
    with pytest.raises(kit.core.IterisError, match="Compare Merges has no rows"):
        node.execute(kit.model, concepts, kit.clip)


def test_compare_draws_rows_at_several_strengths(kit):
    compare = kit.node("merge_nodes", "CompareMerges").execute
    rows = {"row_1": "base", "row_2": "stacked", "row_3": "average", "settings": SETTINGS}
    concepts = kit.concepts()

    def drawn(strengths):
        given = {**rows, "strengths": strengths}
        models, clips, labels, *_ = compare(kit.model, concepts, kit.clip, **given).result
        return labels, [kit.draw(*pair) for pair in zip(models, clips, strict=True)]

    labels, pictures = drawn("0.5, 1 0.5")
    at = ["stacked at 0.5", "stacked at 1", "average at 0.5", "average at 1"]
    assert labels == ["base", *at]
    assert drawn("")[0] == ["base", "stacked", "average"]
    whole = drawn("1")[1]
    assert torch.equal(pictures[2], whole[1])
    # Half of the sum of two is their average.
    assert float((pictures[1] - whole[2]).norm() / whole[2].norm()) < 1e-2
    for wrong in ("a lot", "nan"):
        with pytest.raises(kit.core.IterisError, match="strengths"):
            drawn(wrong)


def test_prompts_of_a_merge_name_one_concept_each(kit):
    """A single style goes with every other concept; nothing is prompted for a LoRA always on."""
    make = kit.specs.make_spec
    of = part(kit.pack, "nodes.merge_nodes").prompts_of
    cat, dog = kit.concepts()
    style = make(kit.loras / "c.safetensors", trigger="in ink style", kind="style")
    speed = make(kit.loras / "c.safetensors", kind="always on")
    off = replace(dog, strength=0.0)
    assert of([cat, dog, speed]) == ["sks cat", "zwx dog"]
    assert of([cat, style, dog]) == ["sks cat, in ink style", "zwx dog, in ink style"]
    assert of([cat, style, style]) == ["sks cat", "in ink style", "in ink style"]
    assert of([cat, off]) == ["sks cat"]
    assert of([speed]) == [""]
    merge = kit.node("merge_nodes", "IterisMerge").execute
    given = {"settings": SETTINGS, "method": "average"}
    assert merge(kit.model, (cat, dog), kit.clip, **given).result[5] == ["sks cat", "zwx dog"]
