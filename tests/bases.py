"""Tiny real pipelines of every kind of base model, random LoRAs for them, and plain runs."""

import functools

import torch
from tiny import LETTERS, clip_tokenizer, make_pipeline

from iteris_core import Lora, LowRank
from iteris_core.hosts.diffusers_lora import base_of, pipeline_sites

KINDS = ("sd1", "sdxl", "sd3", "flux")


def clip_config(width: int):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=99, hidden_size=width, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=width,
        bos_token_id=97, eos_token_id=98, pad_token_id=98,
    )  # fmt: skip


def clip_words():
    return clip_tokenizer(16, 97, 98)


def t5_words():
    """A T5 tokenizer of single letters."""
    from transformers import T5Tokenizer

    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocab = [*marks, *((letter, -3.0) for letter in LETTERS)]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0)
    tokenizer.model_max_length = 24
    return tokenizer


def t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(
        T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4)
    )


def make_sdxl(layers: int = 2, transformers: tuple[int, int] = (1, 2)):
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=layers,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=56,
        attention_head_dim=(2, 4), transformer_layers_per_block=transformers, norm_num_groups=8,
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 32,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=None, text_encoder=CLIPTextModel(clip_config(24)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(32)).eval(),
        tokenizer=clip_words(), tokenizer_2=clip_words(),
        unet=unet.eval(), scheduler=DDIMScheduler(),
    )  # fmt: skip


def short(kind):
    """``kind`` with 64 tokens of a caption by default, in place of 256 or 512."""

    def call(self, prompt=None, max_sequence_length=64, **options):
        return kind.__call__(self, prompt, max_sequence_length=max_sequence_length, **options)

    return type(kind.__name__, (kind,), {"__call__": call})


def make_sd3():
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection

    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32,
        pooled_projection_dim=56, out_channels=4, dual_attention_layers=(0,),
    )  # fmt: skip
    return short(StableDiffusion3Pipeline)(
        transformer=transformer.eval(), scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=CLIPTextModelWithProjection(clip_config(24)).eval(),
        text_encoder_2=CLIPTextModelWithProjection(clip_config(32)).eval(),
        tokenizer=clip_words(), tokenizer_2=clip_words(),
        text_encoder_3=t5().eval(), tokenizer_3=t5_words(),
    )  # fmt: skip


def make_flux():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return short(FluxPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=CLIPTextModel(clip_config(24)).eval(), tokenizer=clip_words(),
        text_encoder_2=t5().eval(), tokenizer_2=t5_words(), transformer=transformer.eval(),
    )  # fmt: skip


@functools.cache
def tiny(kind: str):
    """A pipeline to look at and to copy."""
    torch.manual_seed(0)
    makers = {"sd1": make_pipeline, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}
    return makers[kind]()


@functools.cache
def tiny_base(kind: str):
    pipeline = tiny(kind)
    return base_of(pipeline, pipeline_sites(pipeline))


def trained_sites(kind: str) -> list[str]:
    """Attention and feed-forward everywhere, and some of the rest: what LoRAs really change."""
    parts = (
        *(".attn1.to_", ".attn2.to_", ".attn.to_", ".attn.add_", ".self_attn.", "SelfAttention"),
        *(".ff", ".proj_mlp", ".mlp.", "DenseReluDense", ".norm1.linear", ".norm.linear"),
    )
    ends = ("proj_in", "proj_out")
    sites = tiny_base(kind).shapes
    return [s for s in sites if any(part in s for part in parts) or s.endswith(ends)]


def make_lora(
    kind: str, sites=None, seed: int = 1, ranks=(4,), dtype=torch.float32, size: float = 0.5
) -> Lora:
    """A random LoRA; ranks go round; values are exact in ``dtype``."""
    base = tiny_base(kind)
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for index, site in enumerate(sites if sites is not None else trained_sites(kind)):
        shape = base.shapes[site]
        rank, fan = ranks[index % len(ranks)], base.shapes[site][1:]
        width = int(torch.tensor(fan).prod())
        down = torch.randn(rank, width, generator=generator) / width**0.5
        up = torch.randn(shape[0], rank, generator=generator) * (size / rank**0.5)
        kernel = tuple(shape[2:]) or None
        changes[site] = LowRank(up.to(dtype).float(), down.to(dtype).float(), kernel)
    return Lora(changes, f"lora-{seed}", base=base)


def outputs(kind: str, pipeline) -> dict[str, torch.Tensor]:
    """Output of every component on fixed random inputs, for itself (no pooled vector is lost)."""
    generator = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    found = {}
    with torch.no_grad():
        for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
            model = getattr(pipeline, name, None)
            if model is not None:
                tokens = torch.randint(0, 35, (2, 12), generator=generator)
                out = model(tokens)
                found[name] = out.last_hidden_state
                if getattr(out, "text_embeds", None) is not None:
                    found[f"{name} pooled"] = out.text_embeds
        steps = torch.tensor([100.0, 700.0])
        if kind == "sd1":
            found["unet"] = pipeline.unet(randn(2, 4, 8, 8), steps, randn(2, 12, 32)).sample
        elif kind == "sdxl":
            added = {"text_embeds": randn(2, 32), "time_ids": randn(2, 6)}
            found["unet"] = pipeline.unet(
                randn(2, 4, 8, 8), steps, randn(2, 12, 56), added_cond_kwargs=added
            ).sample
        elif kind == "sd3":
            found["transformer"] = pipeline.transformer(
                randn(2, 4, 8, 8), randn(2, 12, 32), randn(2, 56), steps
            ).sample
        else:
            found["transformer"] = pipeline.transformer(
                randn(2, 16, 4), randn(2, 12, 32), randn(2, 24), steps / 1000,
                torch.zeros(16, 3), torch.zeros(12, 3), torch.ones(2),
            ).sample  # fmt: skip
    return found
