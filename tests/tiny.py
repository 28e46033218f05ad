"""Small real pipelines with random weights, and LoRAs for them."""

import string

import torch

from iteris_core import Concept, Lora, LowRank

LETTERS = string.ascii_lowercase + string.digits


def clip_tokenizer(length: int, start: int, end: int):
    """A CLIP tokenizer of single letters; ``start`` and ``end`` are ids of the marks."""
    from transformers import CLIPTokenizer

    tokens = [*LETTERS, *(f"{c}</w>" for c in LETTERS)]
    marks = {"<|startoftext|>": start, "<|endoftext|>": end}
    vocab = {token: i for i, token in enumerate(tokens)} | marks
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[])
    tokenizer.model_max_length = length
    return tokenizer


def make_pipeline():
    """A StableDiffusionPipeline with 68-site-like structure, a few thousand weights each."""
    from diffusers import (
        AutoencoderTiny,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    count = 2 * len(LETTERS) + 2
    tokenizer = clip_tokenizer(40, count - 2, count - 1)
    config = CLIPTextConfig(
        vocab_size=count, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=40, bos_token_id=count - 2,
        eos_token_id=count - 1, pad_token_id=count - 1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction",
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1), num_decoder_blocks=(1, 1, 1, 1),
        ),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


ATTENTION = ("to_q", "to_k", "to_v", "0", "q_proj", "k_proj", "v_proj", "out_proj")


def is_attention(site: str) -> bool:
    return "attn" in site and site.rpartition(".")[2] in ATTENTION


def random_lora(host, seed: int, rank: int = 4, select=is_attention, size: float = 0.5) -> Lora:
    """A LoRA on the selected sites, big enough to move the outputs."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for site, module in host.sites().items():
        if select(site):
            weight = module.weight.mT if hasattr(module, "nf") else module.weight  # Conv1D
            down = torch.randn(rank, weight[0].numel(), generator=generator)
            up = torch.randn(weight.shape[0], rank, generator=generator)
            kernel = tuple(weight.shape[2:]) or None
            scale = size / (weight[0].numel() * rank) ** 0.5
            sites[site] = LowRank(up.to(weight.dtype), (down * scale).to(weight.dtype), kernel)
    return Lora(sites, f"lora-{seed}")


def two_concepts(host) -> list[Concept]:
    return [
        Concept(random_lora(host, seed), trigger=f"sks{seed}", class_word="cat") for seed in (1, 2)
    ]
