"""What the original code calls the modules of FLUX and SD 3 that diffusers names.

The original code has fused modules: one ``qkv`` where diffusers has three. An :data:`Alias` says
which rows of a fused weight are which site's. Where diffusers swaps shift and scale (its
``AdaLayerNormContinuous``) the two halves of the rows trade places.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Piece:
    """``site`` is made of ``rows``, (start, stop) each, of a fused weight, in this order."""

    site: str
    rows: tuple[tuple[int, int], ...]


Alias = tuple[Piece, ...]

_FLUX_TOP = {
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
_FLUX_DOUBLE = {
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
_FLUX_SINGLE = {
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
_XLABS_DOUBLE = {
    "processor.qkv_lora1": "img_attn.qkv",
    "processor.qkv_lora2": "txt_attn.qkv",
    "processor.proj_lora1": "img_attn.proj",
    "processor.proj_lora2": "txt_attn.proj",
}
_SD3_TOP = {
    "context_embedder": "context_embedder",
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SD3_JOINT = {
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


def original_aliases(kind: str, shapes: Shapes) -> dict[str, Alias]:
    """Original module name → the diffusers sites that it holds, for all sites in ``shapes``.

    ``shapes`` is of a whole transformer, site names with ``transformer.``.
    """
    flux = kind == "flux"
    found: dict[str, Alias] = {}
    for name, path in (_FLUX_TOP if flux else _SD3_TOP).items():
        found |= _fused(name, "transformer", (path,), shapes)
    found |= _swapped("final_layer.adaLN_modulation.1", "transformer.norm_out.linear", shapes)
    double, table = ("double_blocks", _FLUX_DOUBLE) if flux else ("joint_blocks", _SD3_JOINT)
    for number in _numbers("transformer.transformer_blocks.", shapes):
        parent = f"transformer.transformer_blocks.{number}"
        for name, paths in table.items():
            found |= _fused(f"{double}.{number}.{name}", parent, paths, shapes)
        last = f"{parent}.norm1_context.linear"
        if not flux and last in shapes and shapes[last][0] == 2 * shapes[last][1]:
            found |= _swapped(f"{double}.{number}.context_block.adaLN_modulation.1", last, shapes)
    if flux:
        for number in _numbers("transformer.single_transformer_blocks.", shapes):
            parent = f"transformer.single_transformer_blocks.{number}"
            for name, paths in _FLUX_SINGLE.items():
                found |= _fused(f"single_blocks.{number}.{name}", parent, paths, shapes)
    return found


def xlabs_aliases(originals: Mapping[str, Alias]) -> dict[str, Alias]:
    """XLabs' names for the attention modules of FLUX; its ``qkv_lora`` leaves the MLP out."""
    found: dict[str, Alias] = {}
    for name, alias in originals.items():
        kind, _, rest = name.partition(".")
        number, _, module = rest.partition(".")
        if kind == "double_blocks":
            for theirs, ours in _XLABS_DOUBLE.items():
                if module == ours:
                    found[f"double_blocks.{number}.{theirs}"] = alias
        elif kind == "single_blocks" and module == "linear1":
            found[f"single_blocks.{number}.processor.qkv_lora"] = alias[:3]
            found[f"single_blocks.{number}.linear1_qkv"] = alias[:3]
        elif kind == "single_blocks" and module == "linear2":
            found[f"single_blocks.{number}.processor.proj_lora"] = alias
    return found


def _numbers(prefix: str, shapes: Shapes) -> Iterator[int]:
    yield from sorted(
        {int(s.removeprefix(prefix).partition(".")[0]) for s in shapes if s.startswith(prefix)}
    )


def _fused(name: str, parent: str, paths: tuple[str, ...], shapes: Shapes) -> dict[str, Alias]:
    sites = [f"{parent}.{path}" for path in paths]
    if not all(site in shapes for site in sites):
        return {}
    pieces: list[Piece] = []
    start = 0
    for site in sites:
        stop = start + shapes[site][0]
        pieces.append(Piece(site, ((start, stop),)))
        start = stop
    return {name: tuple(pieces)}


def _swapped(name: str, site: str, shapes: Shapes) -> dict[str, Alias]:
    if site not in shapes:
        return {}
    rows = shapes[site][0]
    return {name: (Piece(site, ((rows // 2, rows), (0, rows // 2))),)}
