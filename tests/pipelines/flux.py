"""Reduced FLUX.1, FLUX.2 and their kin."""

from typing import Any

import diffusers
from bases import make_flux

from . import texts
from .parts import SIDE, TEXT, autoencoder, flow, mask, picture, widened
from .reduced import Reduced


def flux() -> Reduced:
    return Reduced(make_flux(), {**SIDE, **TEXT})


def _flux_kin(name: str, inputs: int, **call: Any) -> Reduced:
    """A pipeline whose transformer takes ``inputs`` channels of latents, packed."""
    parts = make_flux().components
    parts["transformer"] = widened(parts["transformer"], in_channels=4 * inputs, out_channels=16)
    parts["vae"] = autoencoder(4)
    if name in ("FluxFillPipeline", "FluxControlPipeline"):
        del parts["image_encoder"], parts["feature_extractor"]
    return Reduced(getattr(diffusers, name)(**parts), {**SIDE, **TEXT, **call})


def flux_kontext() -> Reduced:
    call = {"image": picture(), "max_area": 64 * 64, "_auto_resize": False}
    return _flux_kin("FluxKontextPipeline", 4, **call)


def flux_fill() -> Reduced:
    # Latents, those of the masked picture, and 64 pixels of the mask for each latent.
    call = {"image": picture(), "mask_image": mask(), "guidance_scale": 4.0}
    return _flux_kin("FluxFillPipeline", 4 + 4 + 64, **call)


def flux_inpainting() -> Reduced:
    call = {"image": picture(), "mask_image": mask(), "strength": 1.0}
    return _flux_kin("FluxInpaintPipeline", 4, **call)


def flux_control() -> Reduced:
    return _flux_kin("FluxControlPipeline", 4 + 4, control_image=picture())


def _flux2_transformer(text: int, guidance: bool):
    return diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=text, timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip


def _flux2_autoencoder():
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, norm_num_groups=4, layers_per_block=1,
        mid_block_add_attention=False,
    )  # fmt: skip


def flux2() -> Reduced:
    pipeline = diffusers.Flux2Pipeline(
        scheduler=flow(), vae=_flux2_autoencoder(), text_encoder=texts.mistral(),
        tokenizer=texts.mistral_processor(), transformer=_flux2_transformer(96, True),
    )  # fmt: skip
    pipeline.system_message = "draw."
    call = {**SIDE, "max_sequence_length": 128, "text_encoder_out_layers": (1, 2, 3)}
    return Reduced(pipeline, call)


def flux2_klein() -> Reduced:
    pipeline = diffusers.Flux2KleinPipeline(
        scheduler=flow(), vae=_flux2_autoencoder(), tokenizer=texts.qwen_words(),
        text_encoder=texts.language_model("Qwen3ForCausalLM"),
        transformer=_flux2_transformer(96, False),
    )  # fmt: skip
    call = {**SIDE, "max_sequence_length": 128, "text_encoder_out_layers": (1, 2, 3)}
    return Reduced(pipeline, call)


def chroma() -> Reduced:
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
        approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1,
    )  # fmt: skip
    pipeline = diffusers.ChromaPipeline(
        scheduler=flow(), vae=None, text_encoder=texts.t5(), tokenizer=texts.t5_tokens(),
        transformer=transformer,
    )  # fmt: skip
    return Reduced(pipeline, {**SIDE, **TEXT})


FLUX = {
    "FLUX.1": flux,
    "FLUX.1 Kontext": flux_kontext,
    "FLUX.1 Fill": flux_fill,
    "FLUX.1 inpainting": flux_inpainting,
    "FLUX.1 Control": flux_control,
    "FLUX.2": flux2,
    "FLUX.2 Klein": flux2_klein,
    "Chroma": chroma,
}
