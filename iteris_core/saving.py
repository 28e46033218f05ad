"""Files and folders that appear under their name only when complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .errors import IterisError, OutputError, SaveError, brief

_FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def together() -> Generator[Callable[[Path], Path]]:
    """Yield a function that returns a path at which to write the file or folder that it is given.
    All of them get their names at the end, or none does. Each lies in a temporary folder beside its
    place. A link stays one; what it points to is replaced. An unfinished LoRA has another ending,
    because programs list all .safetensors.

    If the disk is full, or anything else is raised, nothing is left behind and existing files
    stay. Operating system errors, including safetensors', become :class:`SaveError`.
    """
    written: list[tuple[Path, Path]] = []  # where it is, and its own place
    current = Path()
    with ExitStack() as folders:

        def beside(path: Path) -> Path:
            nonlocal current
            current = path
            folder = Path(tempfile.mkdtemp(prefix=".iteris-", dir=path.resolve().parent))
            folders.callback(shutil.rmtree, folder, ignore_errors=True)
            ending = ".part" if path.suffix == ".safetensors" else path.suffix
            written.append((folder / f"unfinished{ending}", path))
            return written[-1][0]

        try:
            yield beside
            undo: list[tuple[Path, Path]] = []
            try:
                for unfinished, current in written:
                    target, old = current.resolve(), unfinished.with_name("replaced")
                    if len(written) > 1:  # otherwise the name is never without a file
                        undo.append((old, target))
                        if target.exists():
                            target.replace(old)
                        undo.append((target, unfinished))
                    unfinished.replace(target)
            except BaseException:
                aside = folders.pop_all()  # a file that cannot be put back stays there
                for now, before in reversed(undo):
                    if now.exists():
                        now.replace(before)
                aside.close()
                raise
        except IterisError:
            raise
        except OSError as error:
            raise SaveError(_sentence(current, error, error.errno or 0)) from error
        except Exception as error:
            match = _OS_ERROR.search(str(error))  # other libraries name it only in their message
            if match is None:
                raise
            raise SaveError(_sentence(current, error, int(match[1]))) from error


@contextmanager
def atomically(path: Path) -> Generator[Path]:
    """Yield a path at which to write the file or folder ``path``, as :func:`together` does."""
    with together() as beside:
        yield beside(path)


def check_new(path: Path, *, overwrite: bool) -> None:
    """As :func:`check_place`; also refuses an existing ``path``, unless ``overwrite``."""
    if os.path.exists(path) and not overwrite:
        raise OutputError(
            f"{path} exists already; choose another name, or overwrite it (option overwrite)."
        )
    check_place(path)


def check_place(path: Path) -> None:
    """Raise :class:`IterisError` if no file of that name can be written in the folder of
    ``path``."""
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist; create it first.")
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # fails for a name that is too long
        with tempfile.TemporaryFile(dir=path.resolve().parent) as probe:
            probe.write(b" ")
    except OSError as error:
        raise SaveError(_sentence(path, error, error.errno or 0)) from error


def _sentence(path: Path, error: Exception, code: int) -> str:
    there = "the existing file is unchanged" if os.path.exists(path) else "no partial file is left"
    why = os.strerror(code) if code else brief(error)
    what = "Make it writable, or choose another folder."
    if code in _FULL:
        why = f"{why}; {shutil.disk_usage(path.parent).free / 1e6:.1f} MB free on the disk"
        what = "Make room, or choose a folder on another disk."
    if code == errno.ENAMETOOLONG:
        what = "Choose a shorter name."
    return f"{path} cannot be written ({why}); {there}. {what}"
