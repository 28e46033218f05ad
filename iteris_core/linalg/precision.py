"""In which precision products are made, and how matrices are taken to another in pieces."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision(device: torch.device) -> Generator[None]:
    """float32 products that are float32: no TF32, no bfloat16 passes, no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    """Where factorisations are made: on the CPU for devices without float64."""
    return torch.device("cpu") if device.type == "mps" else device
