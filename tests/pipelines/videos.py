"""Reduced pipelines that draw videos."""

from typing import Any

import diffusers

from . import texts
from .parts import TEXT, flow, picture
from .pictures import kandinsky5_transformer
from .reduced import Reduced

SIDE = {"height": 32, "width": 32, "num_frames": 5}


def _wan_transformer(**options: Any):
    return diffusers.WanTransformer3DModel(
        **{
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
            "rope_max_seq_len": 64, **options,
        }
    )  # fmt: skip


def _wan_autoencoder():
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1] * 4,
        latents_std=[1.2] * 4,
    )  # fmt: skip


def _wan(**parts: Any):
    return diffusers.WanPipeline(
        tokenizer=texts.t5_tokens(), text_encoder=texts.t5(multilingual=True),
        vae=_wan_autoencoder(), scheduler=flow(shift=3.0),
        transformer=_wan_transformer(), **parts,
    )  # fmt: skip


def _eye(projection: bool = False) -> dict[str, Any]:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=16,
    )  # fmt: skip
    kind: Any = transformers.CLIPVisionModel
    if projection:
        kind = transformers.CLIPVisionModelWithProjection
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    return {"image_encoder": kind(config), "image_processor": processor}


def wan() -> Reduced:
    return Reduced(_wan(), {**SIDE, **TEXT})


def wan_two_experts() -> Reduced:
    pipeline = _wan(transformer_2=_wan_transformer(), boundary_ratio=0.875)
    return Reduced(pipeline, {**SIDE, **TEXT, "guidance_scale_2": 3.0})


def wan_picture() -> Reduced:
    pipeline = diffusers.WanImageToVideoPipeline(
        tokenizer=texts.t5_tokens(), text_encoder=texts.t5(multilingual=True),
        vae=_wan_autoencoder(), scheduler=flow(shift=3.0), **_eye(),
        transformer=_wan_transformer(in_channels=4 + 4 + 4, image_dim=32, added_kv_proj_dim=32),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT, "image": picture(32)})


def _skyreels(kind: Any, parts: dict[str, Any], **options: Any):
    transformer = diffusers.SkyReelsV2Transformer3DModel(
        **{
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4,
            "out_channels": 4, "text_dim": 32, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
            "rope_max_seq_len": 64, **options,
        }
    )  # fmt: skip
    return kind(
        tokenizer=texts.t5_tokens(), text_encoder=texts.t5(multilingual=True),
        transformer=transformer, vae=_wan_autoencoder(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        **parts,
    )  # fmt: skip


def skyreels_v2() -> Reduced:
    return Reduced(_skyreels(diffusers.SkyReelsV2Pipeline, {}), {**SIDE, **TEXT})


def skyreels_v2_picture() -> Reduced:
    pipeline = _skyreels(
        diffusers.SkyReelsV2ImageToVideoPipeline, _eye(projection=True), in_channels=4 + 4 + 4,
        image_dim=32, added_kv_proj_dim=32,
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT, "image": picture(32)})


def sana_video() -> Reduced:
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=32, sample_size=4, rope_max_seq_len=64,
    )  # fmt: skip
    pipeline = diffusers.SanaVideoPipeline(
        tokenizer=texts.gemma_words(), text_encoder=texts.language_model("Gemma2Model"),
        vae=_wan_autoencoder(), transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )  # fmt: skip
    call = {"height": 32, "width": 32, "frames": 5, "use_resolution_binning": False}
    return Reduced(pipeline, {**call, **TEXT, "complex_human_instruction": None})


_LTX = {"height": 64, "width": 64, "num_frames": 9, **TEXT}


def _ltx_transformer():
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, num_layers=2, caption_channels=32,
    )  # fmt: skip


def ltx() -> Reduced:
    pipeline = diffusers.LTXPipeline(
        scheduler=flow(), vae=None, text_encoder=texts.t5(), tokenizer=texts.t5_tokens(),
        transformer=_ltx_transformer(),
    )  # fmt: skip
    return Reduced(pipeline, _LTX)


def ltx_picture() -> Reduced:
    """Each token has a time of its own; the first frame's is the end."""
    eye = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5,
    )  # fmt: skip
    pipeline = diffusers.LTXImageToVideoPipeline(
        scheduler=flow(), vae=eye, text_encoder=texts.t5(), tokenizer=texts.t5_tokens(),
        transformer=_ltx_transformer(),
    )  # fmt: skip
    return Reduced(pipeline, {**_LTX, "image": picture(64)})


def ltx2() -> Reduced:
    """Video and sound at once."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        cross_attention_dim=32, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, audio_in_channels=32, audio_out_channels=32, num_layers=2,
        caption_channels=32,
    )  # fmt: skip
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    sizes |= {"num_learnable_registers": 8}
    connectors = LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=texts.SIZES["num_hidden_layers"] + 1,
        **{f"{kind}_connector_{n}": v for kind in ("video", "audio") for n, v in sizes.items()},
    )  # fmt: skip
    eye = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4,
    )  # fmt: skip
    ear = diffusers.AutoencoderKLLTX2Audio(
        base_channels=32, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2
    )
    pipeline = diffusers.LTX2Pipeline(
        scheduler=flow(), vae=eye, audio_vae=ear, text_encoder=texts.gemma3(),
        tokenizer=texts.gemma_words(), connectors=connectors, transformer=transformer,
        vocoder=None,
    )  # fmt: skip
    alone = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0}
    alone |= {"audio_modality_scale": 1.0, "audio_guidance_scale": 1.0, "guidance_scale": 1.0}
    return Reduced(pipeline, {**_LTX, **alone})


def hunyuan() -> Reduced:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 8), patch_size=1,
    )  # fmt: skip
    pipeline = diffusers.HunyuanVideoPipeline(
        text_encoder=texts.language_model("LlamaModel"), tokenizer=texts.words(),
        text_encoder_2=texts.clip(), tokenizer_2=texts.clip_words(), vae=None,
        transformer=transformer, scheduler=flow(shift=7.0),
    )  # fmt: skip
    template = {"template": "Describe {}", "crop_start": 2}
    return Reduced(pipeline, {**SIDE, **TEXT, "prompt_template": template})


def _cogvideox_transformer(channels: int):
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4,
        time_embed_dim=8, text_embed_dim=32, num_layers=2, sample_width=4, sample_height=4,
        sample_frames=5, max_text_seq_length=96,
    )  # fmt: skip


def cogvideox() -> Reduced:
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=texts.t5_tokens(), text_encoder=texts.t5(), vae=None,
        transformer=_cogvideox_transformer(4), scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT})


def cogvideox_picture() -> Reduced:
    eye = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    pipeline = diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=texts.t5_tokens(), text_encoder=texts.t5(), vae=eye,
        transformer=_cogvideox_transformer(4 + 4), scheduler=diffusers.CogVideoXDDIMScheduler(),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT, "image": picture(32)})


def mochi() -> Reduced:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=32, time_embed_dim=8,
    )  # fmt: skip
    pipeline = diffusers.MochiPipeline(
        scheduler=flow(), vae=None, text_encoder=texts.t5(), tokenizer=texts.t5_tokens(),
        transformer=transformer,
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, "num_frames": 7, **TEXT})


def kandinsky5_video() -> Reduced:
    pipeline = diffusers.Kandinsky5T2VPipeline(
        transformer=kandinsky5_transformer(), vae=None, text_encoder=texts.qwen_vl(),
        tokenizer=texts.qwen_processor(), text_encoder_2=texts.clip(),
        tokenizer_2=texts.clip_words(), scheduler=flow(),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, "max_sequence_length": 512})  # its template is long


VIDEOS = {
    "Wan": wan,
    "Wan 2.2 with two experts": wan_two_experts,
    "Wan from a picture": wan_picture,
    "SkyReels V2": skyreels_v2,
    "SkyReels V2 from a picture": skyreels_v2_picture,
    "Sana Video": sana_video,
    "LTX-Video": ltx,
    "LTX-Video from a picture": ltx_picture,
    "LTX-2": ltx2,
    "HunyuanVideo": hunyuan,
    "CogVideoX": cogvideox,
    "CogVideoX from a picture": cogvideox_picture,
    "Mochi": mochi,
    "Kandinsky 5 video": kandinsky5_video,
}
