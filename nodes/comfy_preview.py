"""Previews of samples during denoising, with ComfyUI's own previewer and the user's settings."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .comfy_internals import previews

_log = logging.getLogger(__name__)

Show = Callable[[Any], None]
"""Called with a previewer's image of a step."""


def preview_callback(model: Any, show: Show | None) -> Callable[..., None] | None:
    """A sampler callback that shows the first row at every step; None if previews are off, which is
    the default, or if the model's latents have none."""
    if show is None:
        return None
    previewer = previews.get_previewer(model.load_device, model.model.latent_format)
    if previewer is None:
        return None
    failed = False

    def callback(step: int, denoised: Tensor, latents: Tensor, steps: int) -> None:
        nonlocal failed
        if failed:
            return
        try:
            image = previewer.decode_latent_to_preview_image("JPEG", denoised)
        except Exception:  # a failed preview must not end a merge
            failed = True
            _log.warning("IterIS: no preview of the latents is possible.", exc_info=True)
            return
        show(image)

    return callback
