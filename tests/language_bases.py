"""Tiny transformers models of every kind, adapters for them as saved by peft, and samples."""

import copy

import torch
from peft import LoraConfig, get_peft_model

from iteris_core import Calibration, Concept
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


def make_gpt2():
    """Its linears are Conv1D: weights stored transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), ["c_attn", "c_fc"]


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


MAKERS = {
    "encoder": make_bert,
    "both": make_t5,
    "decoder": make_llama,
    "transposed": make_gpt2,
    "vision": make_blip,
}


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


def tuned_folder(model, targets, folder, seed, **options):
    """An adapter of random factors, saved by peft."""
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=targets, **{"r": 2, **options})
    tuned = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    tuned.save_pretrained(folder)
    return folder


def make_world(kind, folder):
    """(kind, host in float64, two adapter folders in ``folder``)"""
    torch.manual_seed(0)
    model, targets = MAKERS[kind]()
    model = model.double().eval()
    folders = [
        tuned_folder(model, targets, folder / f"adapter{seed}", seed, r=2 + seed, lora_alpha=3)
        for seed in (1, 2)
    ]
    return kind, TransformersHost(model), folders


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


def add_to_weights(model, lora):
    for site, change in lora.sites.items():
        module = model.get_submodule(site.removeprefix("model."))
        dense = change.dense().double()
        transposed = type(module).__name__ == "Conv1D"
        module.weight.data += (dense.mT if transposed else dense).reshape(module.weight.shape)


def logits(model, batch):
    with torch.no_grad():
        found = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    return found.logits
