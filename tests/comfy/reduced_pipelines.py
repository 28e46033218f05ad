"""The weights of a MODEL and CLIP of :mod:`reduced_models` as pipelines of diffusers."""

import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from reduced_models.parts import taken_apart
from reduced_models.texts import FULL_CLIP, T5
from torch import Tensor

_ALIASES = re.compile(r"\.(linear_in|linear_out|to_qkv_mlp_proj|attn\.to_out)\.(weight|bias)$")
"""LyCORIS' names for ff.net, and FLUX.2's names, which stand for FLUX.1's layers beside its own."""


def sdxl_pipeline(model: Any, clip: Any) -> Any:
    """Zeros for the empty prompt are a habit of diffusers that ComfyUI has not."""
    import comfy.utils
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModelWithProjection

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
        attention_head_dim=(1, 2), transformer_layers_per_block=(1, 1),
        use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    state = model.model.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
    # SDXL's added embedding goes by two names there.
    own = {t: state[o] for t, o in names.items() if o in state and not t.startswith("class_")}
    _load(unet, own)
    big = {"hidden_size": 1280, "num_attention_heads": 20, "hidden_act": "gelu"}
    return StableDiffusionXLPipeline(
        vae=None,
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
            clip_sample=False, set_alpha_to_one=False, steps_offset=1,
        ),
        text_encoder=_clip(clip.cond_stage_model.clip_l),
        text_encoder_2=_clip(clip.cond_stage_model.clip_g, CLIPTextModelWithProjection, **big),
        tokenizer=_words(),
        tokenizer_2=_words(pad_token="!"),
        force_zeros_for_empty_prompt=False,
    )  # fmt: skip


def flux_pipeline(model: Any, clip: Any) -> Any:
    """The noise levels are those of ComfyUI's ModelSamplingFlux, whose shift is e to the 1.15."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=768,
        axes_dims_rope=(8, 12, 12), guidance_embeds=True,
    )  # fmt: skip
    _load(transformer, flux_parts(model, model.model.diffusion_model.state_dict()))
    t5 = T5EncoderModel(T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **T5))
    state = {k: v.clone() for k, v in clip.cond_stage_model.t5xxl.transformer.state_dict().items()}
    assert not t5.load_state_dict(state, strict=False).unexpected_keys
    folder = Path(os.environ["COMFYUI_PATH"]) / "comfy/text_encoders/t5_tokenizer"
    return FluxPipeline(
        vae=None,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=math.exp(1.15)),
        text_encoder=_clip(clip.cond_stage_model.clip_l),
        tokenizer=_words(),
        text_encoder_2=t5.eval(),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder, model_max_length=256),
    )


def flux_parts(model: Any, state: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """diffusers' weights out of ComfyUI's, of which several are fused."""
    import comfy.utils

    found: dict[str, Tensor] = {}
    for theirs, target in comfy.utils.flux_to_diffusers(
        model.model.model_config.unet_config, prefix
    ).items():
        key, offset, function = taken_apart(target)
        if key in state and not _ALIASES.search(theirs):
            part = state[key] if offset is None else state[key].narrow(*offset)
            found[theirs] = part if function is None else function(part)
    return found


@torch.no_grad()
def _load(module: Any, state: dict[str, Tensor]) -> None:
    module.load_state_dict({name: weight.clone() for name, weight in state.items()})


def _clip(encoder: Any, kind: Any = None, **config: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 768, "num_attention_heads": 12, **FULL_CLIP, **config}
    model = (kind or CLIPTextModel)(
        CLIPTextConfig(
            projection_dim=sizes["hidden_size"], bos_token_id=49406, eos_token_id=49407,
            pad_token_id=49407, **sizes,
        )
    )  # fmt: skip
    own = set(model.state_dict())
    state: dict[str, Tensor] = {}
    for name, weight in encoder.transformer.state_dict().items():
        found = {name, name.removeprefix("text_model.")} & own
        if found:
            state[found.pop()] = weight.clone()
    assert set(state) == own - {"text_model.embeddings.position_ids", "embeddings.position_ids"}
    model.load_state_dict(state, strict=False)
    return model.eval()


def _words(**options: Any) -> Any:
    from transformers import CLIPTokenizer

    folder = Path(os.environ["COMFYUI_PATH"]) / "comfy/sd1_tokenizer"
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, **options)
