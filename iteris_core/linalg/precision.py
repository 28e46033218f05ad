"""In which precision products are made, and how matrices are taken to another in pieces."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_HIGHEST = "highest"
_EXACT = ("none", "ieee")


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """float32 products that are float32: no TF32, no bfloat16 passes, no autocast.

    PyTorch's setting is the process's: of several threads the first one in changes it, where it
    allows less, and the last one out puts it back.
    """
    _SETTING.enter()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _SETTING.leave()


class _Setting:
    """PyTorch's precision of float32 products: one value, and from 2.9 on one of each backend,
    which cannot be read as the one value while the two disagree."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._backends: list[tuple[Any, str]] = []
        self._value = _HIGHEST

    def enter(self) -> None:
        with self._lock:
            if not self._inside:
                self._raise()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put_back()

    def _raise(self) -> None:
        backends = [(one, one.fp32_precision) for one in _backends()]
        self._backends = [pair for pair in backends if pair[1] not in _EXACT]
        for backend, _ in self._backends:
            backend.fp32_precision = "ieee"
        self._value = torch.get_float32_matmul_precision()
        if self._value != _HIGHEST:
            self._backends = backends  # those of all backends follow the one value
            torch.set_float32_matmul_precision(_HIGHEST)

    def _put_back(self) -> None:
        if self._value != _HIGHEST:
            torch.set_float32_matmul_precision(self._value)
        for backend, precision in self._backends:
            backend.fp32_precision = "none"  # as the settings above this one say
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


_SETTING = _Setting()


def _backends() -> list[Any]:
    """PyTorch's settings of products by backend; none before 2.9."""
    named: list[Any] = [torch.backends.cuda.matmul]
    named.append(getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in named if hasattr(backend, "fp32_precision")]


def pieces(matrix: Tensor) -> list[slice]:
    """Its rows in pieces of 2 MiB in float64 (more on a GPU), to be taken to float64 in turn."""
    entries = 1 << (18 if matrix.device.type == "cpu" else 24)
    step = max(1, entries // matrix.shape[1])
    return [slice(start, start + step) for start in range(0, len(matrix), step)]


def frobenius(matrix: Tensor) -> float:
    """‖matrix‖_F, summed up in float64 where the device has that, piece by piece."""
    dtype = torch.float32 if matrix.device.type == "mps" else torch.float64
    norms = [torch.linalg.vector_norm(matrix[rows], dtype=dtype) for rows in pieces(matrix)]
    return float(torch.linalg.vector_norm(torch.stack(norms)))


def energy(matrix: Tensor) -> Tensor:
    """‖matrix‖²_F as a float64 scalar (float32 where the device has no float64), without a copy."""
    return torch.linalg.vector_norm(matrix).to(energy_dtype(matrix.device)) ** 2


def energy_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def solve_device(device: torch.device) -> torch.device:
    """The device of factorisations: the CPU for devices without float64."""
    return torch.device("cpu") if device.type == "mps" else device
