"""Files that appear under their name only when complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import IterisError, OutputError, SaveError, brief

_FULL = {getattr(errno, name, None) for name in ("ENOSPC", "EDQUOT", "EFBIG")}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def together() -> Generator[Callable[[Path], Path]]:
    """Yield a function that returns a path at which to write the file that it is given. All files
    get their names at the end, or none does. Each lies in a temporary folder beside its place. A
    link stays one; what it points to is replaced. An unfinished LoRA has another ending, because
    programs list all .safetensors.

    If the disk is full, or anything else is raised, nothing is left behind and existing files
    stay. Operating system errors, including safetensors', become :class:`SaveError`; a folder in a
    file's place is refused.
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
                    _refuse_folder(current)
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
    """Yield a path at which to write the file ``path``, as :func:`together` does."""
    with together() as beside:
        yield beside(path)


@contextmanager
def new_folder(folder: Path) -> Generator[None]:
    """Context in which the files of a new ``folder`` are written. If anything is raised, it is
    removed again, unless something lies in it. Raises :class:`IterisError` if it cannot be made, or
    is there already."""
    if os.path.lexists(folder):
        raise OutputError(f"{folder} exists already; choose another name.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except OSError as error:
        raise SaveError(_sentence(folder, error, error.errno or 0)) from error
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


@contextmanager
def interrupts_wait() -> Generator[list[Any]]:
    """Context at whose end Ctrl-C takes effect. Yields the interrupts so far; those that are taken
    out of the list have none. Other threads are never interrupted."""
    waiting: list[Any] = []

    def wait(*interrupt: Any) -> None:
        waiting.append(interrupt)

    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield waiting
        return
    signal.signal(signal.SIGINT, wait)
    try:
        yield waiting
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            signal.raise_signal(signal.SIGINT)


def check_new(path: Path, *, overwrite: bool) -> None:
    """Raise :class:`IterisError` if no file ``path`` can be written: where its folder does not take
    it, where there is a folder of that name or, unless ``overwrite``, anything."""
    _refuse_folder(path)
    if os.path.exists(path) and not overwrite:
        raise OutputError(
            f"{path} exists already; choose another name, or overwrite it (option overwrite)."
        )
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist; create it first.")
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # fails for a name that is too long
        with tempfile.TemporaryFile(dir=path.resolve().parent) as probe:
            probe.write(b" ")
    except OSError as error:
        raise SaveError(_sentence(path, error, error.errno or 0)) from error


def _refuse_folder(path: Path) -> None:
    if os.path.isdir(path):
        raise OutputError(f"{path} is a folder, which stays; choose another name for the file.")


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
