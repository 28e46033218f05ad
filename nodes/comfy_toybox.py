"""The toybox as native ComfyUI objects, in float32, and its node."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ..iteris_core.errors import IterisError
from ..toybox import BASE, TEMPLATES, ToyConcept, load_clip, pivotal_concepts
from ..toybox import concepts as toy_concepts
from .comfy_internals import base_of, comfy, memory
from .comfy_scorer import ComfyScorer, check_open_clip
from .concept_specs import make_spec
from .pictures import to_image
from .schema import schema

_WEIGHTS = "diffusion_pytorch_model.safetensors"


class IterisToybox(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "IterisToybox",
            ["demo", "test model", "example"],
            inputs=[io.String.Input("tokens", default="sks1, sks6")],
            outputs=("MODEL", "CLIP", "VAE", "concepts", "references", "prompts", "scorer"),
            lists=("references", "prompts"),
        )

    @classmethod
    def execute(cls, tokens: str) -> io.NodeOutput:
        chosen = _chosen(tokens)
        return io.NodeOutput(
            _model(BASE / "unet"),
            _clip(BASE),
            _vae(BASE / "vae"),
            tuple(
                make_spec(
                    one.lora,
                    trigger=one.token,
                    class_word=one.class_word,
                    prompts="\n".join(t.format(f"{one.token} {one.class_word}") for t in TEMPLATES),
                )
                for one in chosen
            ),
            [to_image([Image.open(path) for path in concept.references]) for concept in chosen],
            [
                one.instance_prompt.replace(one.token, f"embedding:{one.token.strip('<>')}")
                if one.embedding is not None
                else one.instance_prompt
                for one in chosen
            ],
            cache(_scorer),
        )


def _scorer() -> ComfyScorer:
    check_open_clip()
    return ComfyScorer(*load_clip())


def _chosen(tokens: str) -> list[ToyConcept]:
    concepts = {**toy_concepts(), **pivotal_concepts()}
    known = {token.strip("<>"): concept for token, concept in concepts.items()}
    names = [name.strip(" <>") for name in tokens.split(",") if name.strip(" <>")]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise IterisError(
            f"The toybox has no concept {', '.join(unknown) or 'of that name'}; its concepts are: "
            f"{', '.join(known)}."
        )
    return [known[name] for name in names]


class _SmallSD15(base_of("comfy.supported_models.SD15")):
    """SD 1.5's architecture with smaller widths and images, and v-prediction."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012
    latent_size: tuple[int, int]

    def model_type(self, state_dict: Any, prefix: str = "") -> Any:
        return comfy.model_base.ModelType.V_PREDICTION


def _model(folder: Path) -> Any:
    theirs = json.loads((folder / "config.json").read_text())
    config = _SmallSD15(_unet_config(theirs))
    config.latent_size = (theirs["sample_size"],) * 2
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    state = _float32(folder / _WEIGHTS)
    model.diffusion_model.load_state_dict(
        {ours: state[theirs] for theirs, ours in names.items() if theirs in state}
    )
    return comfy.model_patcher.ModelPatcher(
        model, load_device=memory.get_torch_device(), offload_device=memory.unet_offload_device()
    )


def _unet_config(theirs: dict[str, Any]) -> dict[str, Any]:
    widths, layers = theirs["block_out_channels"], theirs["layers_per_block"]
    levels = len(widths)
    return {
        "image_size": 32,
        "in_channels": theirs["in_channels"], "out_channels": theirs["out_channels"],
        "model_channels": widths[0], "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [layers] * levels,
        "transformer_depth": [1] * (layers * levels), "transformer_depth_middle": 1,
        "transformer_depth_output": [1] * ((layers + 1) * levels),
        "context_dim": theirs["cross_attention_dim"], "adm_in_channels": None,
        "num_heads": theirs["attention_head_dim"],  # diffusers' name for their number
        "num_head_channels": -1, "use_checkpoint": False, "legacy": False,
        "use_spatial_transformer": True, "use_linear_in_transformer": False,
        "use_temporal_attention": False,
    }  # fmt: skip


def _clip(folder: Path) -> Any:
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    ids = {"start": "bos", "end": "eos", "pad": "pad"}
    special = {name: config[f"{token}_token_id"] for name, token in ids.items()}
    parts = comfy.sd1_clip
    words, width = str(folder / "tokenizer"), config["hidden_size"]
    model = partial(parts.SDClipModel, textmodel_json_config=dict(config), special_tokens=special)
    tokenizer = partial(parts.SDTokenizer, words, embedding_size=width)
    target = comfy.supported_models_base.ClipTarget(
        partial(parts.SD1Tokenizer, clip_name="l", tokenizer=tokenizer),
        partial(parts.SD1ClipModel, clip_name="l", clip_model=model),
    )
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"dtype": torch.float32},
    )
    state = _float32(folder / "text_encoder" / "model.safetensors")
    named = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in state.items()}
    text_model = clip.cond_stage_model.clip_l.transformer
    # The toybox has a small vocabulary; ComfyUI's embedding has CLIP's 49408 rows.
    key = "text_model.embeddings.token_embedding.weight"
    rows = text_model.get_input_embeddings().weight.shape[0] - named[key].shape[0]
    named[key] = torch.nn.functional.pad(named[key], (0, 0, 0, rows))
    named["text_projection.weight"] = torch.eye(width)
    text_model.load_state_dict(named, strict=False)
    return clip


def _vae(folder: Path) -> Any:
    """AutoencoderTiny is TAESD; its decoder's clamp counts as a layer there."""
    scaling = json.loads((folder / "config.json").read_text()).get("scaling_factor", 1.0)
    sd15 = comfy.supported_models.SD15.latent_format().scale_factor
    state = {"vae_scale": torch.tensor(sd15 / scaling), "vae_shift": torch.tensor(0.0)}
    for name, tensor in _float32(folder / _WEIGHTS).items():
        part, _, rest = name.partition(".layers.")
        layer, _, leaf = rest.partition(".")
        number = int(layer) + (part == "decoder")
        state[f"taesd_{part}.{number}.{leaf}"] = tensor
    return comfy.sd.VAE(sd=state)


def _float32(file: Path) -> dict[str, Tensor]:
    return {name: tensor.float() for name, tensor in load_file(file).items()}
