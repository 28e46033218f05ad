"""Where a UNet adds the outputs of its transformer blocks to the residual stream.

diffusers' and ComfyUI's UNets name these modules alike.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

_ADDED = {"attn1.to_out.0": "norm1", "attn2.to_out.0": "norm2", "ff.net.2": "norm3"}
"""A site within a transformer block, and the module that reads the stream it is added to."""


def unet_streams(unet: nn.Module, sites: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Site of ``sites`` → the module whose input is its residual stream, in execution order.

    Blocks that gate or modulate what they add (adaptive norms) have none.
    """
    names = {module: site for site, module in sites.items()}
    streams: dict[str, nn.Module] = {}
    for block in unet.modules():
        if type(block).__name__ != "BasicTransformerBlock":
            continue
        if getattr(block, "norm_type", "layer_norm") != "layer_norm":
            continue
        parts = dict(block.named_modules())
        for added, reader in _ADDED.items():
            site = names.get(parts.get(added, nn.Identity()))
            if site is not None and isinstance(parts.get(reader), nn.LayerNorm):
                streams[site] = parts[reader]
    return streams
