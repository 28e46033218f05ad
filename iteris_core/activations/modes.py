"""Saves and restores torch's modes of this thread, which greenlets share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_DEVICES = ("cpu", "cuda", "mps", "xpu")


@dataclass(frozen=True)
class Modes:
    """Torch's modes: gradients, autocast per device with its dtype, and its cache."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[bool, torch.dtype], ...]
    cache: bool

    @staticmethod
    def now() -> Modes:
        return Modes(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple(
                (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
                for device in _DEVICES
            ),
            torch.is_autocast_cache_enabled(),
        )

    def restore(self) -> None:
        """Set all but inference mode, which cannot be set."""
        torch.set_grad_enabled(self.grad)
        for device, (enabled, dtype) in zip(_DEVICES, self.autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(self.cache)
