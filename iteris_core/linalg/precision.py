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
