"""What UNets have in common: the original (LDM, SGM) code's names, the stream, and the forward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from .marks import key_width, reads_all_but_t5, said_base, square_latents
from .pieces import Alias, Shapes, whole
from .record import Architecture, Conditioning, Fit, PipelineCalls
from .wirings import Wiring

WIRINGS = (
    # diffusers' and ComfyUI's UNets name these modules alike.
    Wiring(
        frozenset({"norm1", "attn1", "norm3", "ff"}),
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

_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)
_MID = re.compile(r"mid_block\.((?:resnets|attentions)\.\d+)\.(.+)")


def original_names(paths: Iterable[str]) -> dict[str, str]:
    """Original name of every module path of one whole UNet; modules without one are left out.

    The numbering follows from the paths: ``layers`` resnets per down block, one more per up block.
    """
    paths = list(paths)
    blocks = [match for match in map(_BLOCK.fullmatch, paths) if match]
    first = [int(m[4]) for m in blocks if (m[1], m[2], m[3]) == ("down", "0", "resnets")]
    layers = max(first, default=0) + 1
    attentive = {m[2] for m in blocks if (m[1], m[3]) == ("up", "attentions")}
    names: dict[str, str] = {}
    for path in paths:
        if path in _TOP:
            names[path] = _TOP[path]
        elif mid := _MID.fullmatch(path):
            if mid[1] in _MIDDLE:
                names[path] = f"middle_block.{_MIDDLE[mid[1]]}.{_inner(mid[1], mid[2])}"
        elif block := _BLOCK.fullmatch(path):
            names[path] = _block_name(block, layers, block[2] in attentive)
    return names


def _inner(kind: str, rest: str) -> str:
    return _RESNET.get(rest, rest) if kind.startswith("resnets") else rest


def _block_name(match: re.Match[str], layers: int, attentive: bool) -> str:
    side, kind, rest = match[1], match[3], match[5]
    block, layer = int(match[2]), int(match[4])
    start = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{start + layers + 1}.0.{'op' if rest == 'conv' else rest}"
    if kind == "upsamplers":
        return f"output_blocks.{start + layers}.{2 if attentive else 1}.{rest}"
    part = 0 if kind == "resnets" else 1
    number = start + layer + (1 if side == "down" else 0)
    name = "input_blocks" if side == "down" else "output_blocks"
    return f"{name}.{number}.{part}.{_inner(kind, rest)}"


def aliases(shapes: Shapes) -> dict[str, Alias]:
    """The original code's names of a UNet's modules, each one site."""
    sites = [site for site in shapes if site.startswith("unet.")]
    named = original_names(site.removeprefix("unet.") for site in sites)
    return {name: whole(f"unet.{path}", shapes) for path, name in named.items()}


def is_xl(shapes: Shapes) -> bool:
    """Whether these are sites of SDXL: it alone has a second text encoder, or added sizes."""
    return any(site.startswith(("unet.add_embedding.", "text_encoder_2.")) for site in shapes)


def fits_sites(shapes: Shapes, *, wide: bool) -> Fit:
    """How well sites fit SD 1.x or, ``wide``, SD 2.x, which reads text embeddings 1024 wide."""
    if is_xl(shapes) or not any(site.startswith("unet.") for site in shapes):
        return Fit.NO
    widths = [shape[1] for site, shape in shapes.items() if site.endswith(".attn2.to_k")]
    return Fit.LIKELY if (widths[:1] == [1024]) == wide else Fit.NO


def is_file_of_xl(shapes: Shapes, metadata: Mapping[str, str]) -> bool:
    """Whether a file of a UNet is of SDXL."""
    text = " ".join(shapes)
    marks = ("text_encoder_2.", "lora_te2_", "label_emb", "add_embedding")
    deep = ("input_blocks_4_1_transformer_blocks_1", "attentions_0_transformer_blocks_1")
    return (
        any(mark in text for mark in (*marks, *deep))
        or "xl" in said_base(metadata)
        or key_width(shapes, "attn2") == 2048
    )


def is_file(shapes: Shapes) -> bool:
    """Whether a file is of a UNet."""
    text = " ".join(shapes)
    others = ("single_blocks", "double_blocks", "joint_blocks", "single_transformer_blocks")
    return (
        any(mark in text for mark in ("unet", "down_blocks", "input_blocks", "lora_te"))
        and not any(mark in text for mark in others)
        and not any(key.startswith(("transformer.", "lora_transformer_")) for key in shapes)
    )


def fits_file(shapes: Shapes, metadata: Mapping[str, str], *, wide: bool) -> Fit:
    """How well a file fits SD 1.x or, ``wide``, SD 2.x."""
    if not is_file(shapes) or is_file_of_xl(shapes, metadata):
        return Fit.NO
    return Fit.LIKELY if (key_width(shapes, "attn2") == 1024) == wide else Fit.NO


def encode(pipeline: Any, prompts: list[str]) -> Conditioning:
    """One CLIP encoder's states."""
    return {"states": pipeline.encode_prompt(prompts, pipeline._execution_device, 1, False)[0]}


def arguments(
    pipeline: Any, latents: Tensor, timesteps: Tensor, text: Conditioning, guidance: float
) -> dict[str, Any]:
    """Of the UNet's forward."""
    return {"sample": latents, "timestep": timesteps, "encoder_hidden_states": text["states"]}


def stable_diffusion(
    name: str,
    title: str,
    models: Callable[[], Mapping[str, nn.Module]],
    *,
    wide: bool,
    **names: Any,
) -> Architecture:
    """SD 1.x or 2.x, which differ in their text encoder: ``names`` are further fields."""
    return Architecture(
        name, title,
        partial(fits_sites, wide=wide),
        partial(fits_file, wide=wide),
        models, denoiser="unet", original_names=aliases, text_prefixes=("lora_te",),
        one_alpha=("unet", "text_encoder"), diffusers_reads=reads_all_but_t5, wirings=WIRINGS,
        pipeline=PipelineCalls(
            pipeline="StableDiffusionPipeline", denoisers=("UNet2DConditionModel",),
            single_files=("v2",) if wide else ("v1",), parts=("text_encoder", "tokenizer"),
            encode=encode, arguments=arguments, latent_shape=square_latents,
        ),
        **names,
    )  # fmt: skip
