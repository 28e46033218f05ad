"""FLUX.1, SD 3 and 3.5: diffusion transformers whose original code fuses modules.

It has one ``qkv`` for diffusers' three modules, and swaps shift and scale compared with diffusers'
``AdaLayerNormContinuous``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from .record import T5_XXL, Alias, Architecture, Shapes, clip, fused, permuted, text_component
from .sites import Component

_PREFIX = "transformer."

Modules = Mapping[str, tuple[str, ...]]
"""Original module name → the diffusers modules that it fuses"""

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_IMAGE_STREAM = (_QKV, ("attn.to_out.0",), ("ff.net.0.proj",), ("ff.net.2",), ("norm1.linear",))
_TEXT_STREAM = (
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *(("attn.to_add_out",), ("ff_context.net.0.proj",), ("ff_context.net.2",)),
    ("norm1_context.linear",),
)


def _streams(image: str, text: str, *leaves: str) -> Modules:
    """A block's modules for image and text; ``leaves`` are the names in each."""
    names = [prefix + leaf for prefix in (image, text) for leaf in leaves]
    return dict(zip(names, (*_IMAGE_STREAM, *_TEXT_STREAM), strict=True))


def _aliases(
    top: Mapping[str, str], blocks: Mapping[str, tuple[str, Modules]], shapes: Shapes
) -> dict[str, Alias]:
    """Original module name → the sites that it contains, if all of them are in ``shapes``. ``top``
    lists modules outside blocks; ``blocks`` maps diffusers' name of a list of blocks to the
    original name and the modules of each block."""
    named = {name: [_PREFIX + path] for name, path in top.items()}
    for ours, (theirs, modules) in blocks.items():
        prefix = f"{_PREFIX}{ours}."
        within = [site.removeprefix(prefix) for site in shapes if site.startswith(prefix)]
        for number in sorted({int(path.partition(".")[0]) for path in within}):
            for name, paths in modules.items():
                named[f"{theirs}.{number}.{name}"] = [f"{prefix}{number}.{p}" for p in paths]
    return {name: _alias(s, shapes) for name, s in named.items() if shapes.keys() >= {*s}}


def _alias(sites: list[str], shapes: Shapes) -> Alias:
    """Shift and scale of norms are swapped: the output's, and SD 3's last block's for text."""
    rows, width = shapes[sites[0]][:2]
    if sites[0].endswith((".norm_out.linear", ".norm1_context.linear")) and rows == 2 * width:
        return permuted(sites[0], [*range(width, rows), *range(width)])
    return fused(sites, shapes)


_OUTPUT = {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "norm_out.linear"}
_EMBEDDERS = "time_text_embed.{}_embedder.linear_{}"
_FLUX_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{
        f"{name}_in.{layer}_layer": _EMBEDDERS.format(embedder, number)
        for name, embedder in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance"))
        for number, layer in enumerate(("in", "out"), 1)
    },
    **_OUTPUT,
}
_SINGLE = {
    "linear1": (*_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_FLUX_BLOCKS = {
    "transformer_blocks": (
        "double_blocks",
        _streams("img_", "txt_", "attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin"),
    ),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
_XLABS = {
    "transformer_blocks": (
        "double_blocks",
        {
            f"processor.{name}_lora{number}": paths
            for number, stream in enumerate((_IMAGE_STREAM, _TEXT_STREAM), 1)
            for name, paths in zip(("qkv", "proj"), stream[:2], strict=True)
        },
    ),
    "single_transformer_blocks": (
        "single_blocks",
        {"processor.qkv_lora": _QKV, "linear1_qkv": _QKV, "processor.proj_lora": ("proj_out",)},
    ),
}
"""XLabs' names of the attention modules; its ``qkv_lora`` excludes the MLP."""

FLUX = Architecture(
    "flux", "FLUX.1",
    components={
        "text_encoder": clip(768, 12, projected=False), "text_encoder_2": T5_XXL,
        "transformer": Component("diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),
    },
    original_names=partial(_aliases, _FLUX_TOP, _FLUX_BLOCKS),
    further_names=partial(_aliases, {}, _XLABS), native=True,
    text_prefixes=("lora_te1", "lora_te3"), version="flux1", modelspec="flux-1-dev",
    network="networks.lora_flux", one_alpha=("text_encoder", "text_encoder_2"),
    # Outside its blocks, diffusers does not read the transformer.
    reads_kohya=lambda site: text_component(site) is not None or "_blocks." in site,
    pipeline="FluxPipeline", single_files=("flux-dev", "flux-schnell"),
)  # fmt: skip

_SD3_TOP = {
    "context_embedder": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    **{
        f"{name}_embedder.mlp.{layer}": _EMBEDDERS.format(embedder, number)
        for name, embedder in (("t", "timestep"), ("y", "text"))
        for number, layer in enumerate("02", 1)
    },
    **_OUTPUT,
}
_JOINT = {
    **_streams(
        *("x_block.", "context_block."),
        *("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"),
    ),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
}

SD3 = Architecture(
    "sd3", "SD 3",
    components={
        "text_encoder": clip(768, 12, projected=True),
        "text_encoder_2": clip(1280, 32, projected=True),
        "text_encoder_3": T5_XXL,
        "transformer": Component("diffusers", "SD3Transformer2DModel", {
            "sample_size": 128, "num_layers": 24, "num_attention_heads": 24,
            "caption_projection_dim": 1536, "pos_embed_max_size": 192,
        }),
    },
    original_names=partial(_aliases, _SD3_TOP, {"transformer_blocks": ("joint_blocks", _JOINT)}),
    native=True, text_prefixes=("lora_te1", "lora_te2", "lora_te3"),
    version="sd3_m", modelspec="stable-diffusion-3-medium", network="networks.lora_sd3",
    one_alpha=("text_encoder", "text_encoder_2", "text_encoder_3"),
    reads_kohya=lambda site: False,
    pipeline="StableDiffusion3Pipeline",
    single_files=("sd3", "sd35_large", "sd35_medium"),
)  # fmt: skip
