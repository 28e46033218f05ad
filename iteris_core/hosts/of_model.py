"""A host for a diffusers pipeline or a transformers model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import SettingsError
from .diffusers import DiffusersHost
from .protocol import Host
from .transformers import TransformersHost


def host_of(model: Any) -> Host:
    """A host unchanged, or a new host with defaults for a pipeline or model. Raises
    :class:`SettingsError` for anything else."""
    if callable(getattr(model, "stages", None)):
        return model
    if isinstance(getattr(model, "components", None), Mapping):
        return DiffusersHost(model)
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        return TransformersHost(model)
    raise SettingsError(
        f"{type(model).__name__} does not run a base model; pass a diffusers pipeline, a "
        "transformers model, or a host for one."
    )
