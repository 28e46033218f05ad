"""The transformers host: encoders, decoders, both, and vision, with adapters as peft saves them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from iteris_core import Calibration, Concept, IterisError, merge_loras
from iteris_core.hosts.peft_folder import write_adapter
from iteris_core.hosts.transformers import TransformersHost

CALIBRATION = Calibration(samples=5)


def make_bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=32, num_labels=4,
    )  # fmt: skip
    return BertForSequenceClassification(config), ["query", "value", "dense"]


def make_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), ["q", "k", "v", "wo"]


def make_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"]


def make_blip():
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {
        "vocab_size": 60, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "sep_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    return BlipForConditionalGeneration(config), ["qkv", "query", "value"]


MAKERS = {"encoder": make_bert, "both": make_t5, "decoder": make_llama, "vision": make_blip}


def make_batches(kind: str, seed: int):
    """Three rows of unequal length in two batches."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows, length in ((2, 7), (3, 5)):
        ids = torch.randint(3, 60, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind == "both":
            batch["decoder_input_ids"] = torch.randint(3, 60, (rows, 4), generator=generator)
            batch["decoder_attention_mask"] = torch.ones(rows, 4, dtype=torch.long)
        if kind == "vision":
            batch["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=generator)
        batches.append(batch)
    return batches


@pytest.fixture(params=list(MAKERS))
def world(request, tmp_path):
    """(kind, host in float64, two adapter folders)"""
    torch.manual_seed(0)
    model, targets = MAKERS[request.param]()
    model = model.double().eval()
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, lora_alpha=3, target_modules=targets)
        tuned = get_peft_model(copy.deepcopy(model), config)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.3
        tuned.save_pretrained(tmp_path / f"adapter{seed}")
        folders.append(tmp_path / f"adapter{seed}")
    return request.param, TransformersHost(model), folders


def concepts_of(kind, host, folders):
    return [
        Concept(host.read_lora(folder), trigger=f"t{i}", inputs=make_batches(kind, i))
        for i, folder in enumerate(folders)
    ]


def largest_gap(ours, theirs):
    assert set(ours.sites) == set(theirs.sites)
    return max(
        float((ours.sites[s].dense() - c.dense()).norm() / c.dense().norm())
        for s, c in theirs.sites.items()
    )


def logits(model, batch):
    with torch.no_grad():
        found = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    return found.logits


def test_adapters_are_read_as_peft_applies_them(world):
    kind, host, folders = world
    batch = make_batches(kind, 9)[1]
    lora = host.read_lora(folders[0])
    plain = copy.deepcopy(host.model)
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(host.model), folders[0]), batch)
    for site, change in lora.sites.items():
        weight = plain.get_submodule(site.removeprefix("model.")).weight
        weight.data += change.dense().double().reshape(weight.shape)
    ours = logits(plain, batch)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert float((ours - logits(host.model, batch)).norm() / theirs.norm()) > 1e-3


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_sweep_is_the_converged_iteration_and_the_base_is_untouched(world, align):
    kind, host, folders = world
    concepts = concepts_of(kind, host, folders)
    before = {name: value.clone() for name, value in host.model.state_dict().items()}
    settings = {"align": align, "statistics": "float64", "ridge": 1e-4}
    sweep = merge_loras(
        host, concepts, settings={**settings, "micro_batch": 2}, calibration=CALIBRATION
    )
    iterated = merge_loras(
        host,
        concepts,
        settings={**settings, "schedule": "jacobi", "iterations": 20},
        calibration=CALIBRATION,
    )
    assert largest_gap(sweep.lora, iterated.lora) < 1e-9
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name])
    alone = merge_loras(host, concepts[:1], settings=settings, calibration=CALIBRATION)
    assert largest_gap(alone.lora, concepts[0].lora) < 1e-5  # factors are float32


def test_padding_counts_for_nothing(world):
    """The same samples with more padding, and other tokens under it, give the same merge."""
    kind, host, folders = world
    if kind == "decoder":
        pytest.skip("a causal model has no tokens that see the padding behind them")
    settings = {"statistics": "float64", "micro_batch": 5}

    def padded(batch):
        ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
        ids[mask == 0] = 7
        pad = torch.full((len(ids), 3), 9)
        return {
            **batch,
            "input_ids": torch.cat([ids, pad], dim=1),
            "attention_mask": torch.cat([mask, torch.zeros_like(pad)], dim=1),
        }

    loras = [host.read_lora(folder) for folder in folders]
    results = [
        merge_loras(
            host,
            [
                Concept(lora, inputs=[change(b) for b in make_batches(kind, i)])
                for i, lora in enumerate(loras)
            ],
            settings=settings,
            calibration=CALIBRATION,
        ).lora
        for change in (dict, padded)
    ]
    assert largest_gap(*results) < 1e-6


def test_a_written_adapter_loads_with_peft(world, tmp_path):
    kind, host, folders = world
    result = merge_loras(host, concepts_of(kind, host, folders), calibration=CALIBRATION)
    folder = write_adapter(result.lora, tmp_path / "merged")
    read = host.read_lora(folder)
    assert largest_gap(read, result.lora) < 1e-6
    batch = make_batches(kind, 9)[1]
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(host.model), folder), batch)
    plain = copy.deepcopy(host.model)
    for site, change in result.lora.sites.items():
        weight = plain.get_submodule(site.removeprefix("model.")).weight
        weight.data += change.dense().double().reshape(weight.shape)
    ours = logits(plain, batch)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    with pytest.raises(IterisError, match="exists already"):
        write_adapter(result.lora, folder)


def test_features_while_each_lora_generates(tmp_path):
    torch.manual_seed(0)
    for make in (make_t5, make_llama):
        model, targets = make()
        host = TransformersHost(model.eval(), generate={"max_new_tokens": 3})
        folders = []
        for seed in (1, 2):
            tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets))
            for name, parameter in tuned.named_parameters():
                if "lora_B" in name:
                    parameter.data = torch.randn_like(parameter)
            tuned.save_pretrained(tmp_path / f"{make.__name__}{seed}")
            folders.append(tmp_path / f"{make.__name__}{seed}")
        concepts = [
            Concept(
                host.read_lora(folder),
                inputs=lambda: [{"input_ids": torch.tensor([[5, 6, 7]])}],
            )
            for folder in folders
        ]
        result = merge_loras(host, concepts)
        assert result.report.rows == 2


def test_bad_adapters_and_inputs_are_errors(tmp_path):
    model, targets = make_bert()
    host = TransformersHost(model)
    with pytest.raises(IterisError, match="no adapter folder"):
        host.read_lora(tmp_path)
    get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=targets)).save_pretrained(
        tmp_path / "a"
    )
    lora = host.read_lora(tmp_path / "a")
    with pytest.raises(IterisError, match="has no inputs"):
        merge_loras(host, [Concept(lora)])
    with pytest.raises(IterisError, match="inputs are empty"):
        merge_loras(host, [Concept(lora, inputs=[])])
    other, _ = make_llama()
    with pytest.raises(IterisError, match="another base model"):
        TransformersHost(other).read_lora(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["peft_type"] = "IA3"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IterisError, match="IA3"):
        host.read_lora(tmp_path / "a")
