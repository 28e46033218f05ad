"""The bases of the speed benchmarks: full-size architectures with random weights; the toybox. And
what runs contenders in turn."""

from __future__ import annotations

import string
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import nn

from iteris_core import Concept, Lora, LowRank
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.transformers import TransformersHost

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def sd15_host(width: int = 320) -> DiffusersHost:
    """Stable Diffusion 1.5's UNet (860 million weights; fewer at another ``width`` of its first
    blocks) and text encoder, float32, random."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = string.ascii_lowercase + string.digits
    tokens = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[])
    tokenizer.model_max_length = 77
    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )
    with torch.device("meta"):
        widths = width, 2 * width, 4 * width, 4 * width
        unet = UNet2DConditionModel(
            cross_attention_dim=768, sample_size=64, block_out_channels=widths
        )
        text_encoder = CLIPTextModel(config)
    pipeline = StableDiffusionPipeline(
        vae=None,
        text_encoder=filled(text_encoder, config.max_position_embeddings),
        tokenizer=tokenizer,
        unet=filled(unet),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return DiffusersHost(pipeline)


def t5_host() -> TransformersHost:
    """T5-base's architecture (223 million weights), random."""
    from transformers import T5Config, T5ForConditionalGeneration

    size = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    config = T5Config(decoder_start_token_id=0, **size)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    return TransformersHost(filled(model))


def toybox_host() -> DiffusersHost:
    import toybox

    return DiffusersHost(toybox.load_pipeline())


def filled(model: nn.Module, positions: int = 0) -> Any:
    """Random weights scaled by fan-in; outputs of residual branches are halved."""
    generator = torch.Generator().manual_seed(0)
    model = model.to_empty(device="cpu")
    for name, weight in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "bias":
            nn.init.zeros_(weight)
        elif weight.ndim == 1:
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
            if name.endswith(("out.0.weight", "net.2.weight", "conv2.weight", ".o.weight")):
                weight.data.mul_(0.5)
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(positions)[None])
        else:
            buffer.zero_()
    return model.eval().requires_grad_(False)


def random_lora(
    host: Any, seed: int, rank: int, select: Callable[[str], bool], size: float = 0.5
) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    sites: dict[str, LowRank] = {}
    for site, module in host.sites().items():
        if select(site):
            fan = module.weight[0].numel()
            down = torch.randn(rank, fan, generator=generator) * size / (fan * rank) ** 0.5
            up = torch.randn(module.weight.shape[0], rank, generator=generator)
            sites[site] = LowRank(up, down, tuple(module.weight.shape[2:]) or None)
    return Lora(sites, f"lora{seed}")


def prompt_concepts(host: Any, count: int, rank: int) -> list[Concept]:
    """With LoRAs on the projections that diffusers' and kohya's trainers change by default."""
    loras = [
        random_lora(host, seed, rank, lambda site: "attn" in site and site.endswith(_ATTENTION))
        for seed in range(count)
    ]
    return [
        Concept(lora, trigger=f"sks{seed}", class_word="cat") for seed, lora in enumerate(loras)
    ]


def denoiser_only(concept: Concept) -> Concept:
    lora = concept.lora or Lora({})
    sites = {site: c for site, c in lora.sites.items() if not site.startswith("text_encoder")}
    return replace(concept, lora=replace(lora, sites=sites))


def text_concepts(host: TransformersHost, count: int, rank: int, samples: int) -> list[Concept]:
    """``samples`` rows of 128 tokens for the encoder and of 32 for the decoder; LoRAs on the
    projections that peft changes in T5, as in the paper."""
    concepts: list[Concept] = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(100 + seed)
        ids = torch.randint(2, 32000, (samples, 128), generator=generator)
        answers = torch.randint(2, 32000, (samples, 32), generator=generator)
        batch = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "decoder_input_ids": answers,
        }
        lora = random_lora(host, seed, rank, lambda site: site.endswith((".q", ".v")))
        concepts.append(Concept(lora, trigger=f"task{seed}", inputs=[batch]))
    return concepts


def toybox_concepts(host: Any, count: int) -> list[Concept]:
    import toybox

    return [
        Concept(host.read_lora(c.lora), trigger=c.token, class_word=c.class_word)
        for c in list(toybox.concepts().values())[:count]
    ]


def in_turn(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Name → seconds of every round, so that other load affects all alike; with ``warm``, after a
    round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(0 if warm else 1, rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: median(some) for name, some in seconds.items()}
