"""SD 3 and 3.5"""

from __future__ import annotations

from collections.abc import Mapping

from . import mmdit, text
from .record import Architecture, said_base
from .row_mapping import Alias, Shapes, swapped
from .sites import Component

_TOP = {
    "context_embedder": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_JOINT = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
}


def _original_names(shapes: Shapes) -> dict[str, Alias]:
    aliases = mmdit.aliases(_TOP, {"transformer_blocks": ("joint_blocks", _JOINT)}, shapes)
    for name, alias in list(aliases.items()):
        site = alias[0].site
        # The last block outputs no text, so its norm has only shift and scale, which are swapped.
        if site.endswith(".norm1_context.linear") and shapes[site][0] == 2 * shapes[site][1]:
            aliases[name] = swapped(site, shapes)
    return aliases


def _fits_sites(shapes: Shapes) -> bool:
    joint = any(site.startswith("transformer.") and ".norm1_context." in site for site in shapes)
    return joint and not mmdit.has_single_blocks(shapes)


def _fits_file(shapes: Shapes, metadata: Mapping[str, str]) -> bool:
    said = said_base(metadata)
    if mmdit.has_single_blocks(shapes):
        return False
    if "joint_blocks" in " ".join(shapes) or "stable-diffusion-3" in said or "sd3" in said:
        return True
    return mmdit.has_transformer(shapes) and not mmdit.is_flux(shapes, metadata)


_COMPONENTS = {
    "text_encoder": text.clip(768, 12, projected=True),
    "text_encoder_2": text.clip(1280, 32, projected=True),
    "text_encoder_3": text.T5_XXL,
    "transformer": Component("diffusers", "SD3Transformer2DModel", {
        "sample_size": 128, "num_layers": 24, "num_attention_heads": 24,
        "caption_projection_dim": 1536, "pos_embed_max_size": 192,
    }),
}  # fmt: skip


ARCHITECTURE = Architecture(
    name="sd3", title="SD 3", fits_sites=_fits_sites, fits_file=_fits_file,
    components=_COMPONENTS,
    original_names=_original_names, native=True, text_prefixes=("lora_te1", "lora_te2", "lora_te3"),
    version="sd3_m", modelspec="stable-diffusion-3-medium", network="networks.lora_sd3",
    one_alpha=("text_encoder", "text_encoder_2", "text_encoder_3"),
    reads_kohya=lambda site: False,
    pipeline="StableDiffusion3Pipeline",
    single_files=("sd3", "sd35_large", "sd35_medium"),
)  # fmt: skip
