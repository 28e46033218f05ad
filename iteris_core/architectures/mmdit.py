"""Names that diffusion transformers with fused modules share: SD 3 and FLUX.

The original code has one ``qkv`` for diffusers' three modules, and swaps shift and scale compared
with diffusers' ``AdaLayerNormContinuous``.
"""

from __future__ import annotations

from collections.abc import Mapping

from .record import key_width, said_base
from .row_mapping import Alias, Shapes, fused, swapped

_PREFIX = "transformer."


Blocks = Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]
"""diffusers' name of a list of blocks → the original name, and the block's modules: original name →
the diffusers modules that it fuses."""


def aliases(top: Mapping[str, str], blocks: Blocks, shapes: Shapes) -> dict[str, Alias]:
    """Original module name → the sites that it contains, if all of them are in ``shapes``; ``top``
    lists modules outside blocks."""
    named = {name: [_PREFIX + path] for name, path in top.items()}
    for ours, (theirs, modules) in blocks.items():
        prefix = f"{_PREFIX}{ours}."
        within = [site.removeprefix(prefix) for site in shapes if site.startswith(prefix)]
        for number in sorted({int(path.partition(".")[0]) for path in within}):
            for name, paths in modules.items():
                named[f"{theirs}.{number}.{name}"] = [f"{prefix}{number}.{p}" for p in paths]
    whole = {n: fused(sites, shapes) for n, sites in named.items() if shapes.keys() >= {*sites}}
    output = f"{_PREFIX}norm_out.linear"
    if output in shapes:
        whole["final_layer.adaLN_modulation.1"] = swapped(output, shapes)
    return whole


def has_transformer(shapes: Shapes) -> bool:
    """True if a file uses diffusers' or OneTrainer's names for a transformer's modules."""
    return any(key.startswith(("transformer.", "lora_transformer_")) for key in shapes)


def has_single_blocks(shapes: Shapes) -> bool:
    """True if a file has the blocks that only FLUX has, under either name."""
    return any("single_blocks" in key or "single_transformer_blocks" in key for key in shapes)


def is_flux(shapes: Shapes, metadata: Mapping[str, str]) -> bool:
    """True if a file is for FLUX, by its blocks, its metadata or its width."""
    return (
        has_single_blocks(shapes)
        or any("double_blocks" in key for key in shapes)
        or (
            has_transformer(shapes)
            and ("flux" in said_base(metadata) or key_width(shapes, "attn") == 3072)
        )
    )
