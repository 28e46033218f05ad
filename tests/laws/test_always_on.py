"""LoRAs that are on in every forward, as if part of the base; in the file or outside it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import SITES, ModuleHost, Net, difference, make_data, make_lora
from tiny import random_lora

from iteris_core import Concept, SettingsError, merge_loras
from iteris_core.concepts import CONCEPT_KEYS
from iteris_core.errors import ConceptError, MismatchError
from iteris_core.lora import Lora
from iteris_core.preview import preview_merge

pytestmark = pytest.mark.usefixtures("unmeasured")

STRENGTH = 0.7


def with_speed(lora: Lora) -> Net:
    """The base with the LoRA in its weights."""
    net = Net()
    for site, change in lora.sites.items():
        weight = net.get_submodule(site).weight
        with torch.no_grad():
            weight += STRENGTH * change.dense().reshape(weight.shape)
    return net


def merged(net, loras, always_on=None, method="iteris", speed=None, **settings):
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    if always_on is not None:
        concepts.insert(1, Concept(speed, strength=STRENGTH, always_on=always_on, trigger="fast"))
    if method == "iteris":
        settings = {"precision": "float64", **settings}
    return merge_loras(ModuleHost(net, make_data(len(loras))), concepts, method, settings=settings)


@pytest.mark.parametrize(("method", "settings"), [
    ("iteris", {}),
    ("iteris", {"schedule": "jacobi", "iterations": 3, "objective": "adapter"}),
    ("iteris", {"steps": 3}),
    ("regmean++", {}),
])  # fmt: skip
def test_it_is_as_if_the_base_had_it(method, settings):
    loras, speed = [make_lora(1), make_lora(2, rank=3)], make_lora(7)
    wanted = merged(with_speed(speed), loras, method=method, **settings)
    outside = merged(Net(), loras, "outside", method, speed, **settings)
    dense = {site: change.dense() for site, change in wanted.lora.sites.items()}
    assert difference(outside.lora, dense) < 1e-6
    included = merged(Net(), loras, "include", method, speed, **settings)
    both = {s: d + STRENGTH * speed.sites[s].dense() if s in speed.sites else d
            for s, d in dense.items()}  # fmt: skip
    assert difference(included.lora, both) < 1e-6
    without = merged(Net(), loras, method=method, **settings)
    assert difference(without.lora, dense) > 1e-3
    assert {len(site.before) for site in included.report.sites.values()} <= {0, 2}
    assert included.report.concepts == wanted.report.concepts


def test_sites_of_its_own_are_in_the_file_and_nothing_else_is_touched():
    speed = make_lora(7)
    loras = [Lora({s: c for s, c in make_lora(n).sites.items() if s != SITES[0]}) for n in (1, 2)]
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = merged(net, loras, "include", speed=speed, repair=False)
    own = result.lora.sites[SITES[0]]
    assert torch.allclose(own.dense(), STRENGTH * speed.sites[SITES[0]].dense())
    assert SITES[0] not in merged(net, loras, "outside", speed=speed, repair=False).lora.sites
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_method_on_weights_has_it_beside_what_it_merges():
    loras, speed = [make_lora(1), make_lora(2)], make_lora(7)
    alone, included = (merged(Net(), loras, on, "average", speed) for on in (None, "include"))
    wanted = {s: c.dense() + STRENGTH * speed.sites[s].dense() for s, c in alone.lora.sites.items()}
    assert difference(included.lora, wanted) < 1e-6


def test_a_cut_keeps_it_whole():
    loras, speed = [make_lora(1), make_lora(2)], make_lora(7)
    change = merged(Net(), loras, "include", speed=speed).lora.sites["q"]
    rank = speed.sites["q"].rank
    kept = change.up[:, :rank] @ change.down[:rank]
    assert torch.allclose(kept, STRENGTH * speed.sites["q"].dense().to(kept.dtype))


def test_the_outlook_counts_what_is_included():
    loras, speed = [make_lora(1), make_lora(2)], make_lora(7)
    outside, included = (merged(Net(), loras, on, speed=speed) for on in ("outside", "include"))
    ranks = [max(c.rank for c in result.lora.sites.values()) for result in (outside, included)]
    assert ranks[1] == ranks[0] + speed.sites["q"].rank
    for result, rank in zip((outside, included), ranks, strict=True):
        assert f"rank at most {rank}," in result.report.outlook


def test_the_report_and_the_recipe_say_so():
    loras, speed = [make_lora(1), make_lora(2)], make_lora(7)
    speed = Lora(speed.sites, "fast", source="fast.safetensors")
    for on, note in (("include", "part of the merged"), ("outside", "load it beside")):
        result = merged(Net(), loras, on, speed=speed)
        assert note in result.report.notes["fast"][-1]
        recipe = json.loads(result.lora.metadata["iteris"])
        assert [c.get("always_on", "no") for c in recipe["concepts"]] == ["no", "no", on]
        entry = {key: recipe["concepts"][-1][key] for key in CONCEPT_KEYS}
        assert Concept.from_dict(entry, "x").always_on == on
        assert ("fast" in result.lora.metadata["modelspec.merged_from"]) == (on == "include")
        assert "fast" not in result.lora.metadata.get("modelspec.trigger_phrase", "")


def test_a_lora_without_words_is_always_on_and_in_the_file(host):
    """As if it were marked so."""
    own, look = (random_lora(host, s, select=lambda site: "mid_block" in site) for s in (1, 2))
    look = replace(look, name="look")
    calibration = {"samples": 2, "timesteps": 1, "denoising_steps": 2}
    subject = Concept(own, trigger="sks", class_word="dog")

    def merge(*concepts):
        return merge_loras(host, concepts, calibration=calibration)

    marked = merge(subject, Concept(look, always_on="include"))
    wordless = merge(subject, Concept(look))
    for site, change in marked.lora.sites.items():
        assert torch.equal(change.up, wordless.lora.sites[site].up)
    assert "no trigger word, so it acts on every prompt" in wordless.report.notes["look"][0]
    recipe = json.loads(wordless.lora.metadata["iteris"])
    assert [concept["always_on"] for concept in recipe["concepts"]] == ["no", "include"]
    prompts = merge(subject, Concept(look, ["a look of a cat"]))
    assert not torch.equal(prompts.lora.sites[site].up, wordless.lora.sites[site].up)


@pytest.mark.parametrize("run", [merge_loras, preview_merge])
def test_nothing_that_is_no_merge_is_saved_as_one(host, run):
    """Before anything runs: which LoRAs have no words, and what to do."""
    one, two = (
        Concept(replace(random_lora(host, s), name=name)) for s, name in ((1, "anna"), (2, "oil"))
    )
    shown = []

    def why(*concepts, method="iteris"):
        with pytest.raises(ConceptError) as refused:
            run(host, concepts, method, on_progress=shown.append)
        return str(refused.value)

    for more in ((), (Concept.preserve(["a landscape"]),)):
        told = why(one, two, *more)
        assert told.startswith("There is nothing to merge: anna and oil have no trigger words, so")
        assert "IterIS LoRAs" in told
    told = why(one, method="regmean")
    assert told.startswith("There is nothing to merge: anna has no trigger words, so it would stay")
    marked = [replace(concept, always_on="include") for concept in (one, two)]
    assert why(*marked).startswith("There is nothing to merge: anna and oil are always on.")
    assert "oil" not in why(one, replace(two, weight=0))
    assert not shown


def test_weights_are_merged_whatever_is_always_on(host):
    """The average of two LoRAs that are on in every prompt is no sum."""
    loras = [random_lora(host, seed) for seed in (1, 2)]
    marked = [Concept(lora, always_on="include") for lora in loras]
    for method, share in (("average", 0.5), ("sum", 1.0)):
        made = merge_loras(host, marked, method)
        for site, change in made.lora.sites.items():
            wanted = share * sum(lora.sites[site].dense() for lora in loras)
            torch.testing.assert_close(change.dense(), wanted)


def test_what_makes_no_sense_is_refused():
    allowed = "always_on: Input should be 'no', 'include' or 'outside'"
    with pytest.raises(ConceptError, match=f"lora-1: {allowed}"):
        Concept(make_lora(1), always_on="yes")  # pyright: ignore
    with pytest.raises(SettingsError, match="only a concept with a LoRA can be always on"):
        merge_loras(None, [Concept(None, ["a"], always_on="include")], "average")
    with pytest.raises(ConceptError, match=f"x: {allowed}"):
        Concept.from_dict({"file": "a.safetensors", "always_on": "yes"}, "x")
    other = Lora({"elsewhere": make_lora(1).sites["q"]})
    with pytest.raises(MismatchError, match="sites are not in the base"):
        merged(Net(), [make_lora(1)], "include", speed=other)


def test_words_are_not_searched_for():
    config = Concept(file=Path("fast.safetensors"), always_on="include")
    assert config.with_found_words({"modelspec.trigger_phrase": "sks dog"}).phrases == []
    assert Concept.from_dict(config.to_dict(), "x") == config
