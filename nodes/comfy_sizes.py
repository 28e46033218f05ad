"""The size of the latents on which a MODEL's features are collected: the rule for all hosts, with
ComfyUI's values for the model's patches, levels and compression."""

from __future__ import annotations

import re
from statistics import median_high
from typing import Any

import torch

from ..iteris_core.architectures.sites import unet_levels
from ..iteris_core.calibration import Calibration
from ..iteris_core.hosts.sizes import FRAMES, default_size
from .comfy_internals import comfy

_SCALES = {
    "SD_X4": 4, "SC_Prior": 42, "SC_B": 4, "Flux2": 16, "LTXV": 32, "Wan22": 16,
    "ChromaRadiance": 1, "HunyuanImage21": 32, "HunyuanImage21Refiner": 16, "HunyuanVideo15": 16,
}  # fmt: skip
"""Pixels per latent side by latent format, if not 8. Later ComfyUI versions provide this as
``spacial_downscale_ratio``."""
_FRAMES = {"Mochi": 6, "LTXV": 8, "Cosmos1CV8x8x8": 8}
"""Frames per latent frame, if not 4 (``temporal_downscale_ratio``)."""
_BANDS = {"ACEAudio": 16}
"""Height of sound latents that have one."""
_LENGTH = 256
"""Length of a sound's latents: about ten seconds."""
_PICTURES = re.compile("Image|T2I|Anima$|Krea")
"""Model classes that make images in video latents."""


def latent_shape(model: Any, calibration: Calibration) -> tuple[int, ...]:
    """(1, channels, [frames,] height, width) of an empty latent for this MODEL; (1, channels,
    [height,] length) for sound."""
    side = calibration.latent_size
    latent_format = model.get_model_object("latent_format")
    if latent_format.latent_dimensions == 1 or _bands(model):
        return (1, latent_format.latent_channels, *_bands(model), side or _LENGTH)
    if side is None:
        sides = token_sides(model)
        # A UNet halves the sides at every level; they must stay integers.
        own = getattr(model.model.model_config, "latent_size", None)
        height, width = default_size(scale(model), median_high(sides), own, max(sides))
    else:
        height = width = side
    empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(1, 4, height, width))
    shape = list(empty.shape)
    if len(shape) == 5 and not _PICTURES.search(type(model.model.model_config).__name__):
        frames = _declared(model, "temporal_downscale_ratio", _FRAMES, 4)
        shape[2] = ((calibration.frames or FRAMES) - 1) // frames + 1
    return tuple(shape)


def token_sides(model: Any) -> list[int]:
    """Latents per token side, by transformer block of a UNet, or of all blocks."""
    network = model.model.diffusion_model
    if isinstance(network, comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel):
        blocks = (*network.input_blocks, network.middle_block, *network.output_blocks)
        if levels := unet_levels(blocks):
            return levels
    config = model.model.model_config.unet_config
    known = getattr(network, "patch_size", None)
    for patch in (known, config.get("patch_size"), config.get("patch_spatial")):
        if patch is not None:
            return [int(patch[-1] if isinstance(patch, (list, tuple)) else patch)]
    return [1]


def scale(model: Any) -> int:
    """Pixels per latent side."""
    return _declared(model, "spacial_downscale_ratio", _SCALES, 8)


def _bands(model: Any) -> tuple[int, ...]:
    return tuple(_BANDS[kind] for kind in _formats(model) if kind in _BANDS)


def _formats(model: Any) -> list[str]:
    """The names of its latent format's class and base classes."""
    return [kind.__name__ for kind in type(model.get_model_object("latent_format")).__mro__]


def _declared(model: Any, name: str, table: dict[str, int], usual: int) -> int:
    latent_format = model.get_model_object("latent_format")
    if hasattr(latent_format, name):
        return int(getattr(latent_format, name))
    return next((table[kind] for kind in _formats(model) if kind in table), usual)
