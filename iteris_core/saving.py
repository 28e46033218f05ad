"""Files and folders that appear under their name only when they are whole."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .errors import IterisError, OutputError, SaveError, brief

_FULL = {
    code
    for name in ("ENOSPC", "EDQUOT", "EFBIG")
    if (code := getattr(errno, name, None)) is not None
}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def atomically(path: Path) -> Generator[Path]:
    """Yield a path to write the file or folder ``path`` to: in a temporary folder beside it, out of
    which it is renamed at the end.

    Where the disk is full, or whatever else is raised, nothing is left of it and what had the name
    keeps it; of the operating system's errors, safetensors' among them, :class:`SaveError` is made.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=path.parent) as folder:
            unfinished = Path(folder, path.name)
            yield unfinished
            unfinished.replace(path)
    except IterisError:
        raise
    except Exception as error:
        code = _code_of(error)
        if code is None:
            raise
        raise SaveError(_sentence(path, error, code)) from error


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raise :class:`OutputError` where something has that name, unless to ``overwrite``, and where
    there is no folder for it."""
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists already; choose another name, or overwrite it (--overwrite, "
            "overwrite=True)."
        )
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist; make it first.")


def _code_of(error: Exception) -> int | None:
    """The operating system's number of an error; other libraries have it in words."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None


def _sentence(path: Path, error: Exception, code: int) -> str:
    there = "the file of that name is as it was" if path.exists() else "nothing of it is left there"
    why, what = (
        os.strerror(code) if code else brief(error),
        "Allow writing there, or give another folder.",
    )
    if code in _FULL:
        free = shutil.disk_usage(path.parent).free / 1e6
        why = f"{why}; {free:.1f} MB of the disk are free"
        what = "Make room, or give a folder on another disk."
    return f"{path} cannot be written ({why}); {there}. {what}"
