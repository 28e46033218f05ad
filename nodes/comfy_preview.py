"""Pictures of samples while they are denoised, by ComfyUI's own previewer, as its user set it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .comfy_internals import previews

_log = logging.getLogger(__name__)

Show = Callable[[Any], None]
"""Called with a previewer's picture of a step."""


def preview_callback(model: Any, show: Show | None) -> Callable[..., None] | None:
    """A sampler's callback that shows the first of the rows at every step; None where the user has
    previews switched off, as is the default, or the model's latents have none."""
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
        except Exception:  # a merge is not to end for want of a picture
            failed = True
            _log.warning("IterIS: the latents cannot be shown.", exc_info=True)
            return
        show(image)

    return callback
