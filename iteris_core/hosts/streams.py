"""Where UNets and CLIP text encoders add a layer's output to their residual stream.

diffusers' (and transformers') and ComfyUI's modules have the same names here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

_ADDED = {"attn1.to_out.0": "norm1", "attn2.to_out.0": "norm2", "ff.net.2": "norm3"}
"""A site within a transformer block, and the module that reads the stream it is added to."""

_ADDED_IN_CLIP = {"self_attn.out_proj": "layer_norm1", "mlp.fc2": "layer_norm2"}


def unet_streams(unet: nn.Module, sites: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Site of ``sites`` → the module whose input is its residual stream, in execution order.

    Blocks that gate or modulate what they add (adaptive norms) have none.
    """
    blocks = [
        block
        for block in unet.modules()
        if type(block).__name__ == "BasicTransformerBlock"
        and getattr(block, "norm_type", "layer_norm") == "layer_norm"
    ]
    return _streams(blocks, sites, _ADDED)


def clip_streams(encoder: nn.Module, sites: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The same for a CLIP text encoder."""
    blocks = [block for block in encoder.modules() if "CLIP" in type(block).__name__]
    return _streams(blocks, sites, _ADDED_IN_CLIP)


def _streams(
    blocks: Iterable[nn.Module], sites: Mapping[str, nn.Module], added: Mapping[str, str]
) -> dict[str, nn.Module]:
    names = {module: site for site, module in sites.items()}
    streams: dict[str, nn.Module] = {}
    for block in blocks:
        parts = dict(block.named_modules())
        for adder, reader in added.items():
            site = names.get(parts.get(adder, nn.Identity()))
            if site is not None and isinstance(parts.get(reader), nn.LayerNorm):
                streams[site] = parts[reader]
    return streams
