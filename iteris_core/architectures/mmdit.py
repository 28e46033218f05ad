"""What diffusion transformers with fused modules have in common: SD 3 and FLUX.

The original code has one ``qkv`` where diffusers has three modules, and swaps shift and scale where
diffusers has an ``AdaLayerNormContinuous``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .pieces import Alias, Shapes, fused, swapped
from .record import Conditioning, key_width, said_base

_PREFIX = "transformer."


@dataclass(frozen=True)
class Table:
    """Names of the original code → the modules of diffusers that it has in one.

    ``top`` is outside of blocks; ``blocks`` says for each of diffusers' lists of blocks what the
    original's is called and what is in a block.
    """

    top: Mapping[str, str]
    blocks: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]]

    def aliases(self, shapes: Shapes) -> dict[str, Alias]:
        """Original module name → the sites that it holds, where all of them are in ``shapes``."""
        aliases: dict[str, Alias] = {}
        for name, path in self.top.items():
            aliases |= _fused(name, [_PREFIX + path], shapes)
        output = f"{_PREFIX}norm_out.linear"
        if output in shapes:
            aliases["final_layer.adaLN_modulation.1"] = swapped(output, shapes)
        for ours, (theirs, modules) in self.blocks.items():
            for number in block_numbers(f"{_PREFIX}{ours}.", shapes):
                for name, paths in modules.items():
                    sites = [f"{_PREFIX}{ours}.{number}.{path}" for path in paths]
                    aliases |= _fused(f"{theirs}.{number}.{name}", sites, shapes)
        return aliases


def _fused(name: str, sites: list[str], shapes: Shapes) -> dict[str, Alias]:
    return {name: fused(sites, shapes)} if all(site in shapes for site in sites) else {}


def block_numbers(prefix: str, shapes: Shapes) -> Iterator[int]:
    """The numbers that follow ``prefix`` in the names of sites, ascending."""
    yield from sorted(
        {int(s.removeprefix(prefix).partition(".")[0]) for s in shapes if s.startswith(prefix)}
    )


def has_transformer(shapes: Shapes) -> bool:
    """Whether a file has the names of diffusers or OneTrainer for a transformer's modules."""
    return any(key.startswith(("transformer.", "lora_transformer_")) for key in shapes)


def has_single_blocks(shapes: Shapes) -> bool:
    """Whether a file has the blocks that FLUX alone has, under either name."""
    return any("single_blocks" in key or "single_transformer_blocks" in key for key in shapes)


def is_flux(shapes: Shapes, metadata: Mapping[str, str]) -> bool:
    """Whether a file is for FLUX, by its blocks, what it says or its width."""
    return (
        has_single_blocks(shapes)
        or any("double_blocks" in key for key in shapes)
        or (
            has_transformer(shapes)
            and ("flux" in said_base(metadata) or key_width(shapes, "attn") == 3072)
        )
    )


def arguments(
    pipeline: Any, latents: Tensor, timesteps: Tensor, text: Conditioning, guidance: float
) -> dict[str, Any]:
    """Of the transformer's forward."""
    return {
        "hidden_states": latents,
        "timestep": timesteps,
        "encoder_hidden_states": text["states"],
        "pooled_projections": text["pooled"],
    }
