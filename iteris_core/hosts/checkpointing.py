"""Gradient checkpointing of diffusers, which is off while a merge takes gradients.

A block that is checkpointed runs once more on the way back, when its forward is over: the hooks of
a merge would give it nothing there.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def without_checkpointing(models: Iterable[nn.Module]) -> Generator[None]:
    """While it is entered, the forwards of ``models`` keep what their gradients need."""
    on: list[Any] = [
        module
        for model in models
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) is True
    ]
    for module in on:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in on:
            module.gradient_checkpointing = True
