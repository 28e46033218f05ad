"""The errors that this package raises on purpose."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class IterisError(Exception):
    """Bad input or an impossible request.

    The message says what is wrong, where (file, key, site) and what to do.
    """


class LoraFileError(IterisError):
    """A LoRA file cannot be read, or does not fit the base model."""


class SettingsError(IterisError):
    """A setting is out of range or contradicts another one."""


class SolveError(IterisError):
    """A site has no usable solution (NaN inputs, a singular system)."""


class OutOfMemory(IterisError):
    """Memory of the device or of the host is not enough, in spite of what was tried."""


class SaveError(IterisError):
    """A file cannot be written; what had its name before still has."""


class MergeCancelled(IterisError):
    """The caller's ``should_stop`` said stop; nothing was changed or written."""


def brief(error: BaseException) -> str:
    """A library's message on one line, cut to 300 characters; its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What ends a sentence about an unknown ``name``: the nearest of ``known``, if one is near."""
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else "."
