"""Other reduced pipelines that draw pictures."""

import functools
from typing import Any

import diffusers
from diffusers.pipelines.ideogram4 import pipeline_ideogram4 as ideogram
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_edit_plus

from . import texts
from .parts import SIDE, TEXT, autoencoder, flow, mask, picture, qwen_autoencoder
from .reduced import Reduced


def _qwen_transformer():
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def qwen_image() -> Reduced:
    pipeline = diffusers.QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=qwen_autoencoder(),
        text_encoder=texts.qwen_vl(), tokenizer=texts.qwen_words(),
        transformer=_qwen_transformer(),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, "true_cfg_scale": 3.0, "negative_prompt": " "})


def qwen_image_inpainting() -> Reduced:
    pipeline = diffusers.QwenImageInpaintPipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=qwen_autoencoder(),
        text_encoder=texts.qwen_vl(), tokenizer=texts.qwen_words(),
        transformer=_qwen_transformer(),
    )  # fmt: skip
    call = {"image": picture(), "mask_image": mask(), "strength": 1.0}
    return Reduced(pipeline, {**SIDE, **call, "true_cfg_scale": 3.0, "negative_prompt": " "})


def _qwen_edit(name: str, module: Any, image: Any) -> Reduced:
    # It makes its references 1024 x 1024 pixels large, whatever the picture is.
    of_area = module.calculate_dimensions
    if not isinstance(of_area, functools.partial):
        module.calculate_dimensions = functools.partial(_reduced_dimensions, of_area)
    pipeline = getattr(diffusers, name)(
        scheduler=flow(use_dynamic_shifting=True), vae=qwen_autoencoder(),
        text_encoder=texts.qwen_vl(), tokenizer=texts.qwen_words(),
        processor=texts.qwen_processor(), transformer=_qwen_transformer(),
    )  # fmt: skip
    guided = {"true_cfg_scale": 3.0, "negative_prompt": " "}
    return Reduced(pipeline, {**SIDE, "image": image, **guided})


def _reduced_dimensions(of_area, area: int, ratio: float):
    return of_area(64 * 64, ratio)


def qwen_image_edit() -> Reduced:
    return _qwen_edit("QwenImageEditPipeline", qwen_edit, picture())


def qwen_image_edit_plus() -> Reduced:
    return _qwen_edit("QwenImageEditPlusPipeline", qwen_edit_plus, [picture(), picture(seed=10)])


def qwen_image21() -> Reduced:
    transformer = diffusers.QwenImage21Transformer2DModel(
        in_channels=16, out_channels=16, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, context_in_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipeline = diffusers.QwenImage21Pipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=None, text_encoder=texts.qwen3_vl(True),
        processor=texts.qwen3_processor(), transformer=transformer,
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, "true_cfg_scale": 3.0, "negative_prompt": " "})


def ideogram4() -> Reduced:
    """A denoiser of its own stands for no text."""
    # It looks at thirteen layers of its text encoder, which has three here.
    ideogram.QWEN3_VL_ACTIVATION_LAYERS = (0, 1, 2)
    transformers = [
        diffusers.Ideogram4Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            intermediate_size=40, adaln_dim=16, llm_features_dim=3 * 32, mrope_section=(4, 2, 2),
        )
        for _ in range(2)
    ]  # fmt: skip
    pipeline = diffusers.Ideogram4Pipeline(
        scheduler=flow(), vae=None, text_encoder=texts.qwen3_vl(), tokenizer=texts.qwen_words(),
        transformer=transformers[0], unconditional_transformer=transformers[1],
    )  # fmt: skip
    call = {"max_sequence_length": 256, "guidance_scale": 3.0, "guidance_schedule": None}
    return Reduced(pipeline, {**SIDE, **call})


def _z_image(kind: Any, vae: Any = None, **call: Any) -> Reduced:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=32, axes_dims=[4, 4, 8], axes_lens=[512, 64, 64],
    )  # fmt: skip
    pipeline = kind(
        scheduler=flow(shift=3.0), vae=vae, transformer=transformer,
        text_encoder=texts.language_model("Qwen3Model"), tokenizer=texts.qwen_words(),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT, "guidance_scale": 3.0, **call})


def z_image() -> Reduced:
    return _z_image(diffusers.ZImagePipeline)


def z_image_inpainting() -> Reduced:
    call = {"image": picture(), "mask_image": mask(), "strength": 1.0}
    return _z_image(diffusers.ZImageInpaintPipeline, autoencoder(), **call)


def lumina2() -> Reduced:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_refiner_layers=1,
        num_attention_heads=2, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 8),
        axes_lens=(512, 64, 64), cap_feat_dim=32,
    )  # fmt: skip
    pipeline = diffusers.Lumina2Pipeline(
        scheduler=flow(), vae=None, transformer=transformer, tokenizer=texts.gemma_words(),
        text_encoder=texts.language_model("Gemma2Model"),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT, "system_prompt": "draw"})


def _sana_transformer(**options: Any):
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32,
        caption_channels=32, sample_size=8, **options,
    )  # fmt: skip


_SANA = {
    **{"height": 256, "width": 256, "use_resolution_binning": False},
    **{**TEXT, "complex_human_instruction": None},
}


def sana() -> Reduced:
    pipeline = diffusers.SanaPipeline(
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
        vae=None, transformer=_sana_transformer(), tokenizer=texts.gemma_words(),
        text_encoder=texts.language_model("Gemma2Model"),
    )  # fmt: skip
    return Reduced(pipeline, _SANA)


def sana_sprint() -> Reduced:
    """In a few steps, with the guidance as an input."""
    pipeline = diffusers.SanaSprintPipeline(
        scheduler=diffusers.SCMScheduler(), vae=None, tokenizer=texts.gemma_words(),
        text_encoder=texts.language_model("Gemma2Model"),
        transformer=_sana_transformer(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
    )  # fmt: skip
    return Reduced(pipeline, {**_SANA, "intermediate_timesteps": None})


def cogview4() -> Reduced:
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        text_embed_dim=32, time_embed_dim=16, condition_dim=8, sample_size=8,
        rope_axes_dim=(8, 8), pos_embed_max_size=16,
    )  # fmt: skip
    pipeline = diffusers.CogView4Pipeline(
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75),
        vae=None, transformer=transformer, tokenizer=texts.words(),
        text_encoder=texts.language_model("GlmModel"),
    )  # fmt: skip
    # Its feed-forward layers run on the picture and again on the text.
    settings = {"schedule": "jacobi", "iterations": 4}
    return Reduced(pipeline, {**SIDE, "max_sequence_length": 128}, settings)


def auraflow() -> Reduced:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip
    pipeline = diffusers.AuraFlowPipeline(
        scheduler=flow(), vae=None, transformer=transformer, tokenizer=texts.t5_tokens(),
        text_encoder=texts.t5(multilingual=True),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT})


def hidream() -> Reduced:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, caption_channels=[32, 32], text_emb_dim=64,
        num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16), llama_layers=[0, 1],
    )  # fmt: skip
    pipeline = diffusers.HiDreamImagePipeline(
        scheduler=flow(), vae=autoencoder(), transformer=transformer,
        text_encoder=texts.clip(projection=True, length=96), tokenizer=texts.clip_words(96),
        text_encoder_2=texts.clip(projection=True, length=96), tokenizer_2=texts.clip_words(96),
        text_encoder_3=texts.t5(), tokenizer_3=texts.t5_tokens(),
        text_encoder_4=texts.language_model("LlamaForCausalLM"), tokenizer_4=texts.words(),
    )  # fmt: skip
    pipeline.default_sample_size = 8
    return Reduced(pipeline, {**SIDE, **TEXT})


def krea2() -> Reduced:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=40, timestep_embed_dim=16, text_hidden_dim=32,
        num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=40, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipeline = diffusers.Krea2Pipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=qwen_autoencoder(),
        text_encoder=texts.qwen3_vl(), tokenizer=texts.qwen_words(), transformer=transformer,
        text_encoder_select_layers=(1, 2, 3),
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT})


def kandinsky5_transformer():
    return diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=16, out_visual_dim=4,
        patch_size=(1, 2, 2), model_dim=32, ff_dim=40, num_text_blocks=1, num_visual_blocks=2,
        axes_dims=(4, 4, 8),
    )  # fmt: skip


def kandinsky5() -> Reduced:
    pipeline = diffusers.Kandinsky5T2IPipeline(
        transformer=kandinsky5_transformer(), vae=autoencoder(), text_encoder=texts.qwen_vl(),
        tokenizer=texts.qwen_processor(), text_encoder_2=texts.clip(),
        tokenizer_2=texts.clip_words(), scheduler=flow(),
    )  # fmt: skip
    pipeline.resolutions = [(64, 64)]
    return Reduced(pipeline, {**SIDE, **TEXT})


PICTURES = {
    "Qwen-Image": qwen_image,
    "Qwen-Image inpainting": qwen_image_inpainting,
    "Qwen-Image-Edit": qwen_image_edit,
    "Qwen-Image-Edit Plus": qwen_image_edit_plus,
    "Qwen-Image 2.1": qwen_image21,
    "Ideogram 4": ideogram4,
    "Z-Image": z_image,
    "Z-Image inpainting": z_image_inpainting,
    "Lumina 2": lumina2,
    "Sana": sana,
    "Sana Sprint": sana_sprint,
    "CogView 4": cogview4,
    "AuraFlow": auraflow,
    "HiDream": hidream,
    "Krea 2": krea2,
    "Kandinsky 5": kandinsky5,
}
