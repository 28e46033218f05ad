"""Conversion between ComfyUI's IMAGE, (images, height, width, 3) in 0 to 1, and other formats."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ..iteris_core.saving import atomically

_THUMBNAIL = 512  # largest side in pixels that LoRA browsers show


def to_pil(batch: Tensor) -> list[Image.Image]:
    pixels = (batch[..., :3].float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return [Image.fromarray(picture) for picture in pixels]


def to_image(pictures: Sequence[Image.Image]) -> Tensor:
    """Convert images of equal size to an IMAGE."""
    arrays = [np.asarray(picture.convert("RGB"), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays))


def to_plot(figure: Any) -> Tensor:
    """A matplotlib Figure as a batch of one. It is drawn whether or not a node takes it: one that
    is connected later gets what was made before."""
    figure.savefig(png := BytesIO(), format="png", dpi=110)
    return to_image([Image.open(png)])


_MARK = "iteris"
"""The text in our PNGs that holds a hash of their pixels."""


def save_thumbnail(batch: Tensor, path: Path) -> bool:
    """Save the first image, scaled down, as a complete PNG with nothing but our mark. False if an
    image without it is there, which stays."""
    if path.exists() and not _is_ours(path):
        return False
    picture = to_pil(batch[:1])[0]
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    (mark := PngInfo()).add_text(_MARK, _pixels(picture))
    with atomically(path) as unfinished:
        unfinished.touch()
        picture.save(unfinished, format="PNG", pnginfo=mark)
    return True


def _is_ours(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get(_MARK) == _pixels(picture)
    except OSError:  # not a picture
        return False


def _pixels(picture: Image.Image) -> str:
    return sha256(picture.tobytes()).hexdigest()
