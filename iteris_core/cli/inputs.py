"""Reads the text files and images that options name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..concepts import lines_of
from ..errors import InputFileError, brief
from .common import warn

MOST_PROMPTS = 2000
"""Most prompts read from one file; far more than a concept uses."""
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompt file. A very long file is thinned out evenly, because a merged file's
    metadata record every prompt that it may use."""
    lines = read_lines(path)
    if len(lines) <= MOST_PROMPTS:
        return lines
    warn(f"{path} has {len(lines)} prompts; using {MOST_PROMPTS} of them, evenly spread.")
    return [lines[index * len(lines) // MOST_PROMPTS] for index in range(MOST_PROMPTS)]


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without empty ones."""
    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{path} is not text in UTF-8 (byte {error.start}); save it again as UTF-8."
        ) from error
    if "\0" in text:
        raise InputFileError(f"{path} is not a text file: it contains null bytes.")
    return lines_of(text)


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
