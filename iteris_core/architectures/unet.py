"""UNets: the names of the original code (LDM, SGM), and the residual stream."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .mmdit import has_single_blocks, has_transformer
from .record import Architecture, key_width, said_base
from .row_mapping import Alias, Shapes, whole
from .sites import Component, Wiring
from .text import clip

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


def aliases(shapes: Shapes) -> dict[str, Alias]:
    """The original code's names of a whole UNet's modules, one site each; modules without one are
    left out.

    The numbering follows from the sites: ``layers`` resnets per down block, one more per up block.
    """
    paths = [site.removeprefix("unet.") for site in shapes if site.startswith("unet.")]
    matches = {path: match for path in paths if (match := _PATH.fullmatch(path))}
    blocks = [match.groups() for match in matches.values()]
    first = [int(b[3]) for b in blocks if b[:3] == ("down", "0", "resnets")]
    layers = max(first, default=0) + 1
    attentive = {b[1] for b in blocks if (b[0], b[2]) == ("up", "attentions")}
    names = {path: _TOP[path] for path in paths if path in _TOP}
    for path, match in matches.items():
        if name := _block_name(match, layers, match[2] in attentive):
            names[path] = name
    return {name: whole(f"unet.{path}", shapes) for path, name in names.items()}


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


def kind_of_sites(shapes: Shapes) -> str | None:
    """The architecture name for a UNet's sites: only SDXL has a second text encoder or added sizes,
    and SD 2.x reads text embeddings of width 1024."""
    if not any(site.startswith("unet.") for site in shapes):
        return None
    if any(site.startswith(("unet.add_embedding.", "text_encoder_2.")) for site in shapes):
        return "sdxl"
    widths = [shape[1] for site, shape in shapes.items() if site.endswith(".attn2.to_k")]
    return "sd2" if widths[:1] == [1024] else "sd1"


def kind_of_file(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """The architecture name for a UNet file."""
    keys, width = " ".join(shapes), key_width(shapes, "attn2")

    def has(*marks: str) -> bool:
        return any(mark in keys for mark in marks)

    if (
        not has("unet", "down_blocks", "input_blocks", "lora_te")
        or has("double_blocks", "joint_blocks")
        or has_single_blocks(shapes)
        or has_transformer(shapes)
    ):
        return None
    deep = ("input_blocks_4_1_transformer_blocks_1", "attentions_0_transformer_blocks_1")
    added = ("text_encoder_2.", "lora_te2_", "label_emb", "add_embedding")
    if has(*added, *deep) or width == 2048 or "xl" in said_base(metadata):
        return "sdxl"
    return "sd2" if width == 1024 else "sd1"


def stable_diffusion(
    name: str,
    title: str,
    sizes: Mapping[str, Any],
    *,
    encoders: Sequence[tuple[int, int, bool]] = ((768, 12, False),),
    pipeline: str = "StableDiffusionPipeline",
    **fields: Any,
) -> Architecture:
    """SD 1.x, 2.x or XL: ``sizes`` are arguments of the released UNet, ``encoders`` those of
    :func:`.text.clip` for each CLIP encoder, ``fields`` additional fields of the record."""
    ends = ["", "_2"][: len(encoders)]
    texts = {f"text_encoder{end}": clip(*of) for end, of in zip(ends, encoders, strict=True)}
    model = Component("diffusers", "UNet2DConditionModel", sizes)
    return Architecture(
        name, title,
        lambda shapes: kind_of_sites(shapes) == name,
        lambda shapes, metadata: kind_of_file(shapes, metadata) == name,
        {**texts, "unet": model}, denoiser="unet", original_names=aliases,
        text_prefixes=("lora_te1", "lora_te2") if len(encoders) > 1 else ("lora_te",),
        one_alpha=("unet", *texts), wirings=WIRINGS,
        pipeline=pipeline,
        **fields,
    )  # fmt: skip
