"""Adapters loaded in a PeftModel or in a pipeline, merged into one beside them."""

import copy
from dataclasses import replace

import pytest
import torch
from command_line import make_world
from diffusers import StableDiffusionPipeline
from language_bases import CALIBRATION, MAKERS, largest_gap, logits, make_batches, make_bert
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import random_lora

from iteris_core import (
    Concept,
    DiffusersHost,
    IterisError,
    add_merged_adapter,
    merge_loaded,
    merge_loras,
    write_lora,
)

pytestmark = pytest.mark.usefixtures("unmeasured")

KINDS = {
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True, "use_rslora": True, "r": 3},
    "wide": {"r": 6, "use_rslora": True},
    "patterns": {"rank_pattern": {"0.*query": 5}, "alpha_pattern": {"query": 7, "value": 1}},
}


def tuned_model(kinds, make=make_bert, dtype=torch.float64):
    """A model with a random adapter of each of ``kinds``, named like it; none is of rank zero."""
    torch.manual_seed(0)
    model, targets = make()
    model = model.to(dtype).eval()
    for number, kind in enumerate(kinds):
        config = LoraConfig(target_modules=targets, **{"r": 4, **KINDS[kind]})
        if number == 0:
            model = get_peft_model(model, config, adapter_name=kind)
        else:
            model.add_adapter(kind, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            if "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model.eval()


def state_of(model, without="merged"):
    return {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.state_dict().items()
        if f".{without}." not in name
    }


def assert_untouched(model, before, active):
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert model.active_adapters == active


def error(model, name, other, batch):
    """How far adapter ``other`` is from what ``name`` changes of the base."""
    found = {}
    for adapter in (name, other):
        model.set_adapter(adapter)
        found[adapter] = logits(model, batch)
    with model.disable_adapter():
        base = logits(model, batch)
    return float((found[other] - found[name]).norm() / (found[name] - base).norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_one_adapter_is_the_adapter(kind):
    model = tuned_model([kind, "patterns" if kind == "wide" else "wide"])
    active, before = model.active_adapters, state_of(model)
    report = add_merged_adapter(
        model, [kind], {kind: make_batches("encoder", 1)}, calibration=CALIBRATION
    )
    assert report.concepts == [kind]
    assert_untouched(model, before, active)
    batch = make_batches("encoder", 9)[1]
    assert error(model, kind, "merged", batch) < 1e-6


def test_what_adapters_of_all_kinds_do_is_kept_on_their_own_inputs():
    """With few tokens a layer's inputs are linearly independent: one change can then be what each
    adapter is on its own."""
    names = ["dora", "wide"]
    model = tuned_model(names)
    rows = {
        name: [{k: v[:1, :4] for k, v in make_batches("encoder", i)[0].items()}]
        for i, name in enumerate(names)
    }
    before = state_of(model)
    add_merged_adapter(model, names, rows, calibration=CALIBRATION,
                       settings={"ridge": 1e-9, "shrink": 1.0})  # fmt: skip
    assert_untouched(model, before, [names[0]])
    for name in names:
        assert error(model, name, "merged", rows[name][0]) < 1e-3


def test_transposed_layers_and_patterns_are_merged():
    model = tuned_model(["rslora", "wide"], MAKERS["transposed"])
    batches = make_batches("transposed", 1)
    add_merged_adapter(model, ["wide"], {"wide": batches}, calibration=CALIBRATION)
    assert error(model, "wide", "merged", make_batches("transposed", 9)[1]) < 1e-5


def test_an_adapter_with_biases_is_refused():
    model, targets = make_bert()
    model = get_peft_model(model, LoraConfig(target_modules=targets, lora_bias=True), "a").eval()
    with pytest.raises(IterisError, match="lora_bias"):
        add_merged_adapter(model, ["a"], {"a": make_batches("encoder", 1)}, calibration=CALIBRATION)


def test_a_head_is_one_adapters_own():
    model, targets = make_bert()
    torch.manual_seed(0)
    config = LoraConfig(
        target_modules=targets, modules_to_save=["classifier"], init_lora_weights=False
    )
    model = get_peft_model(model.double(), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    for name in ("a", "b"):
        head = model.base_model.model.classifier.modules_to_save[name]
        torch.nn.init.normal_(head.weight, std=0.5)
    before = state_of(model)
    batches = make_batches("encoder", 1)
    add_merged_adapter(model, ["b"], {"b": batches}, heads="b", calibration=CALIBRATION)
    assert_untouched(model, before, ["a"])
    assert error(model, "b", "merged", batches[0]) < 1e-6


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = tuned_model(["dora", "wide"])
    batches = make_batches("encoder", 1)
    names = ["dora", "wide"]
    add_merged_adapter(model, names, dict.fromkeys(names, batches), calibration=CALIBRATION)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    base = copy.deepcopy(model).unload()
    again = PeftModel.from_pretrained(base, tmp_path / "merged").double().eval()
    model.set_adapter("merged")
    torch.testing.assert_close(logits(again, batches[0]), logits(model, batches[0]))


@pytest.mark.parametrize("fails", ["merge", "writing"])
def test_after_a_failure_all_is_as_before(fails, monkeypatch):
    model = tuned_model(["dora", "wide"])
    before, active = state_of(model), model.active_adapters
    modules = [name for name, _ in model.named_modules()]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]

    def stop(*_):
        raise KeyboardInterrupt

    more = {"on_progress": stop} if fails == "merge" else {}
    if fails == "writing":
        add = model.add_adapter
        monkeypatch.setattr(model, "add_adapter", lambda *given: stop(add(*given)))
    rows = dict.fromkeys(("dora", "wide"), make_batches("encoder", 1))
    with pytest.raises(KeyboardInterrupt):
        add_merged_adapter(model, ["dora", "wide"], rows, calibration=CALIBRATION, **more)
    assert_untouched(model, before, active)
    assert [name for name, _ in model.named_modules()] == modules
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert list(model.peft_config) == ["dora", "wide"]


def test_what_cannot_be_merged_is_refused():
    model = tuned_model(["rslora", "dora"])
    rows = make_batches("encoder", 1)
    for names, inputs, name, message in (
        (["none"], {"none": rows}, "merged", "no adapter 'none'; known are rslora, dora"),
        (["rslora"], {}, "merged", "'rslora': give its words or inputs"),
        (["rslora"], {"rslora": rows}, "dora", "an adapter 'dora' already"),
        ([], {}, "merged", "Name each adapter"),
    ):
        with pytest.raises(IterisError, match=message):
            add_merged_adapter(model, names, inputs, name)
    model.merge_adapter()
    with pytest.raises(IterisError, match="merged into the weight of"):
        add_merged_adapter(model, ["rslora"], {"rslora": rows})
    model.unmerge_adapter()
    words = ["word_embeddings"]
    model.add_adapter("words", LoraConfig(target_modules=words, init_lora_weights=False))
    with pytest.raises(IterisError, match="as a Embedding, not as a LoRA of a linear layer"):
        add_merged_adapter(model, ["words"], {"words": rows})


FEW = {"samples": 3, "timesteps": 1, "latents": "noise", "latent_size": 4}


@pytest.fixture
def loaded(tmp_path):
    """A pipeline with two adapters at weights of their own, and the folder of their files."""
    folder = make_world(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "base")
    pipeline.set_progress_bar_config(disable=True)
    for number, name in ((1, "cat"), (2, "dog")):
        pipeline.load_lora_weights(str(folder / f"lora{number}.safetensors"), adapter_name=name)
    pipeline.set_adapters(["cat", "dog"], [0.7, 1.2])
    return pipeline, folder


def weights_of(pipeline):
    parts = {part: state_of(getattr(pipeline, part)) for part in ("unet", "text_encoder")}
    return {f"{part}.{name}": tensor for part, of in parts.items() for name, tensor in of.items()}


def test_the_adapters_of_a_pipeline_become_one_at_their_weights(loaded):
    pipeline, folder = loaded
    before = weights_of(pipeline)
    words = {"cat": "sks cat", "dog": {"trigger": "zwx", "class_word": "dog", "weight": 1.5}}
    ours = merge_loaded(pipeline, words, calibration=FEW)
    assert pipeline.get_active_adapters() == ["merged"]
    assert set(pipeline.get_list_adapters()["unet"]) == {"cat", "dog", "merged"}
    after = weights_of(pipeline)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    plain = StableDiffusionPipeline.from_pretrained(folder / "base")
    plain.set_progress_bar_config(disable=True)
    host = DiffusersHost(plain)
    concepts = [
        Concept.from_file(
            host, folder / "lora1.safetensors", trigger="sks", class_word="cat", strength=0.7
        ),
        Concept.from_file(
            host,
            folder / "lora2.safetensors",
            trigger="zwx",
            class_word="dog",
            strength=1.2,
            weight=1.5,
        ),
    ]
    by_hand = merge_loras(plain, concepts, calibration=FEW)
    assert largest_gap(ours.lora, by_hand.lora) < 1e-3
    site = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = pipeline.unet.get_submodule(site)
    wanted = ours.lora.sites[f"unet.{site}"].dense()
    torch.testing.assert_close(layer.get_delta_weight("merged"), wanted, atol=1e-6, rtol=1e-4)
    again = merge_loaded(pipeline, words, calibration=FEW)  # a cell that is run again
    assert largest_gap(again.lora, ours.lora) == 0
    assert set(pipeline.get_list_adapters()["unet"]) == {"cat", "dog", "merged"}
    ours.load_into(plain, "both")
    call = {"num_inference_steps": 2, "output_type": "np", "height": 32, "width": 32}
    pictures = [
        pipe("sks cat", generator=torch.Generator().manual_seed(0), **call).images
        for pipe in (pipeline, plain)
    ]
    assert abs(pictures[0] - pictures[1]).max() < 1e-4


def test_a_pipelines_adapters_are_as_before_when_its_merge_fails(loaded):
    pipeline, _ = loaded
    before = weights_of(pipeline)
    modules = [name for name, _ in pipeline.unet.named_modules()]

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_loaded(pipeline, {"cat": "a", "dog": ["b c"]}, calibration=FEW, on_progress=stop)
    after = weights_of(pipeline)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [name for name, _ in pipeline.unet.named_modules()] == modules
    assert pipeline.get_active_adapters() == ["cat", "dog"]
    with pytest.raises(IterisError, match="'dog': give its words or inputs"):
        merge_loaded(pipeline, {"cat": "a"})
    with pytest.raises(IterisError, match="no active adapter 'cow'; known are cat, dog"):
        merge_loaded(pipeline, {"cow": "a"})
    with pytest.raises(IterisError, match="'dog' is an adapter to merge"):
        merge_loaded(pipeline, {"cat": "a", "dog": "b"}, "dog")


def test_files_and_pipelines_are_taken_as_they_are(loaded, tmp_path):
    pipeline, folder = loaded
    pipeline.unload_lora_weights()
    lora = DiffusersHost(pipeline).read_lora(folder / "lora1.safetensors")
    noted = write_lora(
        replace(lora, metadata={"modelspec.trigger_phrase": "sks cat"}), tmp_path / "n.safetensors"
    )
    other = Concept(random_lora(DiffusersHost(pipeline), 3), trigger="zwx")
    result = merge_loras(pipeline, [noted, other], calibration=FEW)
    assert result.report.concepts == ["sks", "zwx"]
