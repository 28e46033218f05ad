"""Files and folders that appear under their name only when complete."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from .errors import IterisError, OutputError, SaveError, brief

_FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def together() -> Generator[Callable[[Path], Path]]:
    """Yield :func:`atomically` for several files: none has its name before all are complete."""
    with ExitStack() as files:
        yield lambda path: files.enter_context(atomically(path))


@contextmanager
def atomically(path: Path) -> Generator[Path]:
    """Yield a path at which to write the file or folder ``path``: it lies in a temporary folder
    beside it, and is renamed at the end. A link stays one; what it points to is replaced. An
    unfinished LoRA has another ending, because programs list all .safetensors.

    If the disk is full, or anything else is raised, nothing is left behind and an existing file
    stays. Operating system errors, including safetensors', become :class:`SaveError`.
    """
    try:
        target = path.resolve()
        with tempfile.TemporaryDirectory(prefix=f".{path.stem}-", dir=target.parent) as folder:
            listed = path.suffix == ".safetensors"
            unfinished = Path(folder, f"{path.name}.part" if listed else path.name)
            yield unfinished
            unfinished.replace(target)
    except IterisError:
        raise
    except OSError as error:
        raise SaveError(_sentence(path, error, error.errno or 0)) from error
    except Exception as error:
        match = _OS_ERROR.search(str(error))  # other libraries name it only in their message
        if match is None:
            raise
        raise SaveError(_sentence(path, error, int(match[1]))) from error


def rescued(write: Callable[[Path], Sequence[Path]], name: str, error: IterisError) -> IterisError:
    """``error``, with the file below the system's temporary folder that ``write`` wrote, if any."""
    folder = Path(tempfile.gettempdir(), f"iteris-{secrets.token_hex(4)}")
    try:
        folder.mkdir()
        files = write(folder / name)
    except (IterisError, OSError):
        shutil.rmtree(folder, ignore_errors=True)
        return error
    names = " and ".join(map(str, files))
    return type(error)(f"{error} The merge is not lost: it is in {names}.")


def check_new(path: Path, *, overwrite: bool) -> None:
    """As :func:`check_place`; also refuses an existing ``path``, unless ``overwrite``."""
    if path.exists() and not overwrite:
        raise OutputError(
            f"{path} exists already; choose another name, or overwrite it (option overwrite)."
        )
    check_place(path)


def check_place(path: Path) -> None:
    """Raise :class:`IterisError` if no file can be written in the folder of ``path``."""
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist; create it first.")
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent) as probe:
            probe.write(b" ")
    except OSError as error:
        raise SaveError(_sentence(path, error, error.errno or 0)) from error


def _sentence(path: Path, error: Exception, code: int) -> str:
    there = "the existing file is unchanged" if path.exists() else "no partial file is left"
    why = os.strerror(code) if code else brief(error)
    what = "Make it writable, or choose another folder."
    if code in _FULL:
        why = f"{why}; {shutil.disk_usage(path.parent).free / 1e6:.1f} MB free on the disk"
        what = "Make room, or choose a folder on another disk."
    return f"{path} cannot be written ({why}); {there}. {what}"
