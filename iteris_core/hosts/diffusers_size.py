"""The image size for a pipeline: the rule of :mod:`.sizes` in pixels."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..concepts import Calibration
from ..errors import BaseError, SettingsError
from .diffusers_loop import PipelineLoop
from .sizes import FRAMES, MOST_PIXELS, PICTURE_TOKENS, default_size, middle_patch, unet_levels

_SCALES = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_FRAME_SCALES = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
_PIXEL_STEP = 32
"""Every pipeline accepts sides in pixels that are multiples of this."""


def pipeline_size(
    loop: PipelineLoop, calibration: Calibration, prompt: str
) -> tuple[dict[str, int], int]:
    """Height, width and frames to request from a pipeline, and the count of noise numbers per row.

    ``prompt`` can be any prompt.
    """
    size: dict[str, int] = {}
    if "num_frames" in loop.names:
        seconds, fps = (getattr(loop.pipeline, name, 0) for name in ("min_duration", "fps"))
        size["num_frames"] = calibration.frames or max(FRAMES, math.ceil(seconds * fps))
    elif calibration.frames is not None:
        raise SettingsError(
            f"frames is for videos, and {type(loop.pipeline).__name__} draws none; leave it out."
        )
    scale = next((s for s in (getattr(loop.pipeline, n, 0) for n in _SCALES) if s), 8)
    if calibration.latent_size is not None:
        size |= dict.fromkeys(("height", "width"), calibration.latent_size * int(scale))
    sides, latents = _prepared(loop, size, prompt)
    if calibration.latent_size is None and {"height", "width"} <= sides.keys():
        own = sides["height"], sides["width"]
        # The rule, with pixels in place of latents.
        tokens = _tokens(loop, latents, size.get("num_frames", 1))
        patch = max(round(math.sqrt(own[0] * own[1] / tokens)), 1)
        smaller = default_size(1, patch, own, _PIXEL_STEP)
        large = tokens > PICTURE_TOKENS or max(own) > MOST_PIXELS
        if large and "height" in loop.names:
            size |= dict(zip(("height", "width"), smaller, strict=True))
            _, latents = _prepared(loop, size, prompt)
    packed = latents.ndim == 2  # without a batch dimension
    return size, latents.numel() if packed else latents[0].numel()


def _prepared(
    loop: PipelineLoop, size: Mapping[str, int], prompt: str
) -> tuple[dict[str, int], Tensor]:
    """The size that the pipeline passes to its ``prepare_latents``, and the latents that it
    returns."""
    pipeline, kept = loop.pipeline, list[Any]()
    unknown = BaseError(f"{type(pipeline).__name__} makes its latents in an unsupported way.")
    if loop.modular is not None:
        loop.first_call([prompt], size)
        sides, latents = loop.modular.prepared(pipeline)
        if latents is None:
            raise unknown
        return sides, latents
    prepare = getattr(pipeline, "prepare_latents", None)
    if prepare is None:
        raise unknown
    names = inspect.signature(prepare)

    def keep(*args: Any, **kwargs: Any) -> Any:
        prepared = prepare(*args, **kwargs)
        kept.append((names.bind(*args, **kwargs).arguments, prepared))
        return prepared

    pipeline.__dict__["prepare_latents"] = keep
    try:
        loop.first_call([prompt], size)
    finally:
        del pipeline.__dict__["prepare_latents"]
    arguments, prepared = kept[0]
    latents = prepared if isinstance(prepared, Tensor) else prepared[0]
    sides = {n: v for n, v in arguments.items() if n in ("height", "width") and v}
    return sides, latents


def _tokens(loop: PipelineLoop, latents: Tensor, frames: int) -> float:
    """Tokens of one frame at the middle block."""
    if latents.ndim < 4:  # packed; for a video, with all frames
        names = (getattr(loop.pipeline, name, 0) for name in _FRAME_SCALES)
        scale = next((int(s) for s in names if s), 1)
        return latents.shape[-2] / ((frames - 1) // scale + 1)
    denoiser = next(iter(loop.denoisers.values()))
    return latents.shape[-2] * latents.shape[-1] / middle_patch(token_sides(denoiser)) ** 2


def token_sides(denoiser: Any) -> list[int]:
    """Latents per token side, in each transformer block of a UNet, or in all blocks of a
    transformer."""
    if "block_out_channels" in denoiser.config:
        middle = getattr(denoiser, "mid_block", None)
        levels = unet_levels((*denoiser.down_blocks, middle, *denoiser.up_blocks))
        if levels:
            return levels
    patch = denoiser.config.get("patch_size") or denoiser.config.get("all_patch_size") or 1
    return [int(patch[-1] if isinstance(patch, (list, tuple)) else patch)]
