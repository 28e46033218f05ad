"""Precision of products, and piecewise conversion of matrices to another precision."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_HIGHEST = "highest"


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """True float32 products: no TF32, no bfloat16 passes, no autocast. PyTorch's setting is
    process-wide: with several threads, the first to enter raises it if needed, and the last to
    leave restores it."""
    _SETTING.enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _SETTING.leave()


class _Setting:
    """PyTorch's precision of float32 products: one value, and from 2.9 on one per backend. The
    single value cannot be read while they disagree."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._backends: list[tuple[Any, str]] = []
        self._value = _HIGHEST

    def enter(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside > 1:
                return
            backends = [(one, one.fp32_precision) for one in _backends()]
            self._backends = [pair for pair in backends if pair[1] not in ("none", "ieee")]
            for backend, _ in self._backends:
                backend.fp32_precision = "ieee"
            self._value = torch.get_float32_matmul_precision()
            if self._value != _HIGHEST:
                self._backends = backends  # the backends' values follow the single value
                torch.set_float32_matmul_precision(_HIGHEST)

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside:
                return
            if self._value != _HIGHEST:
                torch.set_float32_matmul_precision(self._value)
            for backend, precision in self._backends:
                backend.fp32_precision = "none"  # as the settings above this one say
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision


_SETTING = _Setting()


def _backends() -> list[Any]:
    """PyTorch's per-backend settings for products; empty before 2.9."""
    named: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [backend for backend in named if hasattr(backend, "fp32_precision")]


def pieces(matrix: Tensor) -> list[slice]:
    """A matrix's rows in pieces of 2 MiB in float64 (more on a GPU), for piecewise conversion."""
    entries = 1 << (18 if matrix.device.type == "cpu" else 24)
    step = max(1, entries // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def frobenius(matrix: Tensor) -> float:
    """‖matrix‖_F, summed piecewise in float64 if the device supports it."""
    dtype = torch.float32 if matrix.device.type == "mps" else torch.float64
    norms = [torch.linalg.vector_norm(matrix[rows], dtype=dtype) for rows in pieces(matrix)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def energy(matrix: Tensor) -> Tensor:
    """‖matrix‖²_F as a float64 scalar (float32 if the device lacks float64), without a copy."""
    return torch.linalg.vector_norm(matrix).to(energy_dtype(matrix.device)) ** 2


def energy_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def solve_device(device: torch.device) -> torch.device:
    """The device for factorisations: the CPU if the device lacks float64."""
    return torch.device("cpu") if device.type == "mps" else device
