"""Known base models.

Every :class:`Architecture` that a module of this package defines is registered when the package
loads.
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
    """Register architectures; they take precedence over earlier ones.

    Raises :class:`IterisError` for a name already in use; then none is added.
    """
    global _registered
    names = [known.name for known in (*_registered, *added)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"An architecture {twice[0]} already exists; choose another name.")
    _registered = (*_registered, *added)


def architectures() -> Sequence[Architecture]:
    """All registered architectures."""
    return _registered


def architecture(name: str) -> Architecture:
    """The architecture of that name. Raises :class:`IterisError` if there is none."""
    for known in _registered:
        if known.name == name:
            return known
    names = ", ".join(known.name for known in _registered)
    raise UsageError(f"There is no architecture {name!r}; known are {names}.")


def architecture_of_sites(shapes: Shapes) -> Architecture | None:
    """The architecture of a loaded model with these sites; None if no known one matches."""
    return next((known for known in reversed(_registered) if known.fits_sites(shapes)), None)


def architecture_of_file(shapes: Shapes, metadata: Mapping[str, str]) -> Architecture:
    """The architecture for which a LoRA file was made; ``shapes`` are its tensors', by key.

    Raises :class:`LoraFileError` if no known one matches.
    """
    for known in reversed(_registered):
        if known.fits_file(shapes, metadata):
            return known
    titles = ", ".join(known.title for known in _registered)
    raise LoraFileError(
        f"The file is for none of the known base models ({titles}); is it a LoRA for one of them? "
        f"Its first tensor is {next(iter(shapes), None)}."
    )


def _discover() -> None:
    for module in pkgutil.iter_modules(__path__):
        named = vars(importlib.import_module(f".{module.name}", __name__)).values()
        register(*(value for value in named if isinstance(value, Architecture)))


_discover()
