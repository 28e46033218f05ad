"""SD 1.x, 2.x and XL: the UNet's names in the original code (LDM, SGM), its residual stream and the
released sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .record import Alias, Architecture, Shapes, clip, whole
from .sites import Component, Wiring

WIRINGS = (
    # diffusers' and ComfyUI's UNets use the same names for these modules.
    Wiring(
        {"attn1.to_out.0": "norm1", "attn2.to_out.0": "norm2", "ff.net.2": "norm3"},
        extra=frozenset({"norm2", "attn2", "norm_in", "ff_in", "pos_embed", "fuser"}),
        layer="BasicTransformerBlock",
    ),
)

_TOP = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}

_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}

_PATH = re.compile(
    r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def _aliases(shapes: Shapes) -> dict[str, Alias]:
    """The original code's names of a whole UNet's modules, one site each; modules without one are
    left out.

    The numbering follows from the sites: ``layers`` resnets per down block, one more per up block.
    """
    paths = [site.removeprefix("unet.") for site in shapes if site.startswith("unet.")]
    first = [int(path.split(".")[3]) for path in paths if path.startswith("down_blocks.0.resnets.")]
    layers = max(first, default=0) + 1
    attentive = {path.split(".")[1] for path in paths if re.match(r"up_.*\.attentions\.", path)}
    names: dict[str, Alias] = {}
    for path in paths:
        match = _PATH.fullmatch(path)
        name = _block_name(match, layers, match[2] in attentive) if match else _TOP.get(path)
        if name:
            names[name] = whole(f"unet.{path}", shapes)
    return names


def _block_name(match: re.Match[str], layers: int, attentive: bool) -> str | None:
    side, kind, layer, rest = match[1], match[3], int(match[4]), match[5]
    if kind == "resnets":
        rest = _RESNET.get(rest, rest)
    if side == "mid":
        part = _MIDDLE.get(f"{kind}.{layer}")
        return part and f"middle_block.{part}.{rest}"
    start = int(match[2]) * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{start + layers + 1}.0.{'op' if rest == 'conv' else rest}"
    if kind == "upsamplers":
        return f"output_blocks.{start + layers}.{2 if attentive else 1}.{rest}"
    part = 0 if kind == "resnets" else 1
    name, first = ("input_blocks", 1) if side == "down" else ("output_blocks", 0)
    return f"{name}.{start + layer + first}.{part}.{rest}"


def _stable_diffusion(
    name: str,
    title: str,
    sizes: Mapping[str, Any],
    *,
    encoders: Sequence[Component] = (clip(768, 12, projected=False),),
    pipeline: str = "StableDiffusionPipeline",
    **fields: Any,
) -> Architecture:
    """``sizes`` are arguments of the released UNet, ``fields`` additional fields of the record."""
    texts = dict(zip(("text_encoder", "text_encoder_2"), encoders, strict=False))
    return Architecture(
        name, title,
        {**texts, "unet": Component("diffusers", "UNet2DConditionModel", sizes)},
        denoiser="unet", original_names=_aliases,
        text_prefixes=("lora_te1", "lora_te2") if len(texts) > 1 else ("lora_te",),
        one_alpha=("unet", *texts), wirings=WIRINGS, pipeline=pipeline,
        **fields,
    )  # fmt: skip


SD1 = _stable_diffusion(
    "sd1", "SD 1.x", {"cross_attention_dim": 768}, version="sd_v1",
    modelspec="stable-diffusion-v1", single_files=("v1",),
)  # fmt: skip
SD2 = _stable_diffusion(
    "sd2", "SD 2.x",
    {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    encoders=(clip(1024, 23, projected=False),), clips=("clip_h",),
    version="sd_v2", modelspec="stable-diffusion-v2-512", single_files=("v2",),
)  # fmt: skip
SDXL = _stable_diffusion(
    "sdxl", "SDXL",
    {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 2048,
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    encoders=(clip(768, 12, projected=False), clip(1280, 32, projected=True)),
    native=True, version="sdxl_base_v1-0", modelspec="stable-diffusion-xl-v1-base",
    pipeline="StableDiffusionXLPipeline", single_files=("xl_base", "playground-v2-5"),
)  # fmt: skip
