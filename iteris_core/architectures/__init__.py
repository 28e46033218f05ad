"""Base models that are known: one file each, and tables that several share.

Every module of this package that has an ``ARCHITECTURE`` is registered when the package loads.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence

from ..errors import LoraFileError, UsageError
from .record import Architecture
from .row_mapping import Shapes

_registered: tuple[Architecture, ...] = ()


def register(*added: Architecture) -> None:
    """Make architectures known; they are asked before those that were there before.

    Raises :class:`IterisError` for a name that is taken, and then none of them is added.
    """
    global _registered
    names = [known.name for known in (*_registered, *added)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"There is an architecture {twice[0]} already; choose another name.")
    _registered = (*_registered, *added)


def architectures() -> Sequence[Architecture]:
    """All that are known."""
    return _registered


def architecture(name: str) -> Architecture:
    """The one of that name. Raises :class:`IterisError` where there is none."""
    for known in _registered:
        if known.name == name:
            return known
    names = ", ".join(known.name for known in _registered)
    raise UsageError(f"There is no architecture {name!r}; known are {names}.")


def architecture_of_sites(shapes: Shapes) -> Architecture | None:
    """The one that a loaded model with these sites is of; None where no known one fits."""
    return next((known for known in reversed(_registered) if known.fits_sites(shapes)), None)


def architecture_of_file(shapes: Shapes, metadata: Mapping[str, str]) -> Architecture:
    """The one that a LoRA file is for: ``shapes`` are of its tensors, by key.

    Raises :class:`LoraFileError` where no known one fits.
    """
    for known in reversed(_registered):
        if known.fits_file(shapes, metadata):
            return known
    titles = ", ".join(known.title for known in _registered)
    raise LoraFileError(
        f"The file is for no base model that is known here ({titles}); is it a LoRA of such a "
        f"model? Its first tensor is {next(iter(shapes), None)}."
    )


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        record = getattr(importlib.import_module(f".{module.name}", __name__), "ARCHITECTURE", None)
        if isinstance(record, Architecture):
            register(record)


_discover()
