"""Images that the commands read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputFileError, brief

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def open_picture(path: Path) -> Any:
    """An RGB image. Raises :class:`IterisError` if the file is not one."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:  # includes Pillow's errors
        raise InputFileError(f"{path} is not a readable image ({brief(error)}).") from error


def open_images(*paths: Path) -> tuple[list[Path], list[Any]]:
    """Files and their images: single files, and all images of a folder by name."""
    listed: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files = [path] if path.is_file() else [f for f in inside if f.suffix.lower() in _IMAGES]
        if not files:
            kinds = ", ".join(_IMAGES)
            raise InputFileError(f"{path} is neither an image nor a folder of images ({kinds}).")
        listed += files
    return listed, [open_picture(file) for file in listed]
