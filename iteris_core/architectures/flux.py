"""FLUX.1"""

from __future__ import annotations

from functools import partial

from . import mmdit, text
from .record import Architecture
from .row_mapping import Alias, Shapes
from .sites import Component

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_BLOCKS: mmdit.Blocks = {
    "transformer_blocks": ("double_blocks", _DOUBLE),
    "single_transformer_blocks": ("single_blocks", _SINGLE),
}
_XLABS = {
    "img_attn.qkv": ("processor.qkv_lora1",),
    "txt_attn.qkv": ("processor.qkv_lora2",),
    "img_attn.proj": ("processor.proj_lora1",),
    "txt_attn.proj": ("processor.proj_lora2",),
    "linear1": ("processor.qkv_lora", "linear1_qkv"),
    "linear2": ("processor.proj_lora",),
}


def _xlabs(shapes: Shapes) -> dict[str, Alias]:
    """XLabs' names of the attention modules; its ``qkv_lora`` excludes the MLP."""
    aliases: dict[str, Alias] = {}
    for name, alias in mmdit.aliases({}, _BLOCKS, shapes).items():
        block = ".".join(name.split(".")[:2])
        for theirs in _XLABS.get(name.removeprefix(f"{block}."), ()):
            aliases[f"{block}.{theirs}"] = alias[:3]
    return aliases


def _fits_sites(shapes: Shapes) -> bool:
    return any(site.startswith("transformer.single_transformer_blocks.") for site in shapes)


def _reads_kohya(site: str) -> bool:
    """False for the transformer outside its blocks."""
    return text.text_component(site) is not None or "_blocks." in site


ARCHITECTURE = Architecture(
    name="flux", title="FLUX.1", fits_sites=_fits_sites, fits_file=mmdit.is_flux,
    components={
        "text_encoder": text.clip(768, 12, projected=False), "text_encoder_2": text.T5_XXL,
        "transformer": Component("diffusers", "FluxTransformer2DModel", {"guidance_embeds": True}),
    },
    original_names=partial(mmdit.aliases, _TOP, _BLOCKS), further_names=_xlabs, native=True,
    text_prefixes=("lora_te1", "lora_te3"), version="flux1", modelspec="flux-1-dev",
    network="networks.lora_flux", one_alpha=("text_encoder", "text_encoder_2"),
    reads_kohya=_reads_kohya,
    pipeline="FluxPipeline", single_files=("flux-dev", "flux-schnell"),
)  # fmt: skip
