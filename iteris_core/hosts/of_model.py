"""A host of what people have in hand: a pipeline of diffusers, a model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import SettingsError
from .diffusers import DiffusersHost
from .protocol import Host
from .transformers import TransformersHost


def host_of(model: Any) -> Host:
    """A host as it is, else a new one with its defaults. Raises :class:`SettingsError` for what is
    neither a pipeline nor a model."""
    if callable(getattr(model, "stages", None)):
        return model
    if isinstance(getattr(model, "components", None), Mapping):
        return DiffusersHost(model)
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        return TransformersHost(model)
    raise SettingsError(
        f"{type(model).__name__} does not run a base model; pass a pipeline of diffusers, a model "
        "of transformers, or a host of one."
    )
