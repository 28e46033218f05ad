"""One node for many LoRAs, their words and prompts, and the stacks of other packs."""

import json

import pytest
import torch
from kit import part, use_folders
from safetensors.torch import save_file


class Bench:
    """The node, with LoRAs in the kit's folder, and what it shows."""

    def __init__(self, kit, monkeypatch):
        self.kit, self.folder, self.shown = kit, kit.loras, list[str]()
        use_folders(monkeypatch, kit.folder, "loras")
        save_file({"lora_unet_x.alpha": torch.ones(1)}, self.folder / "mute.safetensors")
        node = self.module("concept_nodes")
        monkeypatch.setattr(node, "show_text", lambda text, _: self.shown.append(text))
        self.node, self.error = kit.node("concept_nodes", "IterisLoras"), kit.core.IterisError

    def module(self, name):
        return part(self.kit.pack, f"nodes.{name}")

    def run(self, **values):
        return self.node.execute(**values).result

    def stack(self, *entries):
        """Both with words."""
        specs = self.module("concept_specs").specs_of(entries)
        return [
            spec.called([word], "you") for spec, word in zip(specs, ("sks", "zwx"), strict=True)
        ]

    def beside(self, name, *words):
        text = json.dumps({"trainedWords": words})
        (self.folder / f"{name}.civitai.info").write_text(text)


@pytest.fixture
def bench(kit, monkeypatch):
    return Bench(kit, monkeypatch)


def test_rows_are_on_or_off_at_their_strengths(bench):
    first = {"lora_1": "a.safetensors", "strength_1": 0.8, "clip_1": 0.0, "weight_1": 2.0}
    off = {"lora_2": "b.safetensors", "on_2": False, "lora_3": "none"}
    last = {"lora_5": "b.safetensors", "words_5": "zwx dog", "prompts_5": "style"}
    specs, words = bench.run(**first, **off, **last)
    assert [(s.file.name, s.strength, s.text_strength, s.weight, s.kind) for s in specs] == [
        ("a.safetensors", 0.8, 0.0, 2.0, "subject"),
        ("b.safetensors", 1.0, 1.0, 1.0, "style"),
    ]
    assert words == "sks cat, zwx dog"
    first = "a at 0.8/0: sks cat (a guess from its captions)"
    assert bench.shown == [f"{first}\nb at 1: zwx dog, style"]
    assert bench.run() == ((), "")
    assert bench.shown[-1] == "No LoRA is on."


def test_weights_by_block_are_those_of_the_row(bench):
    specs, _ = bench.run(
        lora_1="a.safetensors", blocks_1=" INALL ", lora_2="b.safetensors", blocks_3="1"
    )
    assert [spec.blocks for spec in specs] == ["INALL", ""]
    found = bench.module("comfy_routes").blocks_of_lora("a.safetensors")
    assert found["count"] == 17
    assert {count: len(names) for count, names in found["lists"].items()} == {
        count: count for count in (12, 17, 20, 26, 61)
    }
    assert found["presets"]["INALL"] == "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0"
    assert bench.module("comfy_routes").blocks_of_lora("../../../etc/passwd")["count"] == 0


def test_words_come_from_beside_the_file_or_from_the_user(bench):
    def phrases(**values):
        (spec,), _ = bench.run(lora_1="a.safetensors", **values)
        return list(spec.phrases)

    assert phrases() == ["sks cat"]
    before = bench.node.fingerprint_inputs(lora_1="a.safetensors")
    bench.beside("a", "tok girl, red hair", "other")
    after = bench.node.fingerprint_inputs(lora_1="a.safetensors")
    assert before != after
    assert phrases() == ["tok girl, red hair", "other"]
    assert "(from .civitai.info)" in bench.shown[-1]
    assert phrases(words_1="mine, and this") == ["mine, and this"]
    assert phrases(words_1="one; two |three") == ["one", "two", "three"]
    found = bench.module("comfy_routes").words_of_lora("a.safetensors")
    assert found == {"words": "tok girl, red hair; other", "source": ".civitai.info"}
    assert bench.module("comfy_routes").words_of_lora("../../../etc/passwd")["words"] == ""


def test_what_a_file_says_of_itself(bench):
    about = bench.module("comfy_routes").about_of_lora
    kind, size, words = about("a.safetensors")["lines"]
    assert (kind, words) == ("sd1", "sks cat")
    assert size.endswith(" MiB")
    assert about("../../../etc/passwd") == {"lines": []}


def test_prompts_of_the_user(bench):
    def prompts(**values):
        (spec,), _ = bench.run(lora_1="a.safetensors", **values)
        return spec.prompts

    assert prompts() is None
    lines = "{} by the sea\n\n  a house  "
    assert prompts(prompts_1="lines", lines=lines) == ("sks cat by the sea", "a house")
    twice = prompts(prompts_1="lines", lines=lines, words_1="x;y")
    assert twice == ("x by the sea", "y by the sea", "a house")
    with pytest.raises(bench.error, match="lines is empty"):
        prompts(prompts_1="lines")
    with pytest.raises(bench.error, match=r"mute\.safetensors contain \{\}"):
        bench.run(lora_1="mute.safetensors", prompts_1="lines", lines="{} here")


STACKS = {
    "tuples": [("a.safetensors", 0.8, 0.0), ("None", 1.0, 1.0), ("b", 1.0, 0.5)],
    "lists": [["a.safetensors", 0.8, 0.0], ["b.safetensors", 1, 0.5]],
    "dictionaries": [
        {"name": "a.safetensors", "lora": {}, "strength": 0.8, "clip_strength": 0.0},
        {"name": "off.safetensors", "strength": 1.0, "enabled": False},
        {"lora_name": "b.safetensors", "strength_model": 1.0, "strength_clip": 0.5},
    ],
}


@pytest.mark.parametrize("kind", STACKS)
def test_stacks_of_other_packs(bench, kind):
    stacks = bench.module("concept_specs")
    assert stacks.specs_of(None) == ()
    specs = stacks.specs_of(STACKS[kind])
    assert [(spec.file.name, spec.strength, spec.text_strength) for spec in specs] == [
        ("a.safetensors", 0.8, 0.0),
        ("b.safetensors", 1.0, 0.5),
    ]
    assert (specs[0].trigger, specs[0].class_word) == ("sks", "cat")
    more, _ = bench.run(concepts=STACKS[kind], lora_1="b.safetensors")
    assert more[:2] == specs
    assert len(more) == 3
    # A row of ComfyUI's own stack, a DynamicGroup, with a gap.
    row = {"lora_name": "a.safetensors", "strength": 0.8}
    (one,) = stacks.specs_of([row, None, {"lora_name": "none", "strength": 1.0}])
    assert (one.file.name, one.strength, one.text_strength) == ("a.safetensors", 0.8, None)
    (alone,) = stacks.specs_of([{"name": "b", "strength": 0.3, "clip_strength": None}])
    assert (alone.strength, alone.text_strength) == (0.3, None)


def test_entries_that_are_not_known_are_refused(bench):
    for entry in (7, "a.safetensors", {"strength": 1.0}, ("a.safetensors", "much")):
        with pytest.raises(bench.error, match="LORA_STACK has an entry"):
            bench.module("concept_specs").specs_of([entry])
    with pytest.raises(bench.error, match="no LoRA gone"):
        bench.module("concept_specs").specs_of([("gone", 1.0)])


def test_without_a_clip(bench, kit):
    """Methods that look at weights take none where no LoRA changes it."""

    def merge(method, clip):
        specs = bench.stack(("a", 1.0, clip), ("b", 0.5, clip))
        return kit.merge(on=(kit.model, None), concepts=specs, method=method)

    result = merge("average", 0.0)
    assert {site.partition(".")[0] for site in result.lora.sites} == {"unet"}
    model, clip = kit.lora.apply_lora(kit.model, None, kit.lora_model(result))
    assert clip is None
    assert model.patches.keys() - kit.model.patches.keys()
    with pytest.raises(bench.error, match=r"a\.safetensors changes the text encoder"):
        merge("average", 1.0)
    with pytest.raises(bench.error, match="prompts need one"):
        merge("iteris", 0.0)
