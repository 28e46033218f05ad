"""How long this machine takes for matrix operations, measured once on small matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

import torch

from .precision import full_precision

Operation = tuple[Literal["product", "factor", "spectrum"], torch.dtype]
"""Multiplications and additions of matrix products; those of Cholesky factors and of solving by
triangles; n³ of an (n, n) matrix whose eigenvectors are found."""

Operations = Mapping[Operation, float]


def product(dtype: torch.dtype, *operations: float) -> Operations:
    return {("product", dtype): float(sum(operations))}


def factor(dtype: torch.dtype, *operations: float) -> Operations:
    return {("factor", dtype): float(sum(operations))}


def spectrum(*sizes: float) -> Operations:
    """Of matrices of these sizes, in float64."""
    return {("spectrum", torch.float64): sum(float(size) ** 3 for size in sizes)}


def together(*some: Operations) -> Operations:
    found: dict[Operation, float] = {}
    for operations in some:
        for operation, count in operations.items():
            found[operation] = found.get(operation, 0.0) + count
    return found


def seconds_of(operations: Operations, device: torch.device) -> float:
    """About so long on ``device``."""
    return sum(count * _seconds(*kind, device.type) for kind, count in operations.items())


@cache
def _seconds(name: str, dtype: torch.dtype, device: str) -> float:
    """Of one operation."""
    size = 256 if device == "cpu" else 1024
    matrix = torch.randn(size, 2 * size, generator=torch.Generator().manual_seed(0)).to(
        device, dtype
    )
    square = matrix @ matrix.mT + size * torch.eye(size, dtype=dtype, device=device)
    if name == "product":
        return _shortest(lambda: matrix.mT @ matrix, device) / (8 * size**3)
    if name == "spectrum":
        return _shortest(lambda: _eigenvectors(square), device) / size**3

    def solve() -> torch.Tensor:
        lower = torch.linalg.cholesky(square)
        return torch.linalg.solve_triangular(lower, square, upper=False)

    return _shortest(solve, device) / (size**3 / 3 + size**3)


def _eigenvectors(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.eigh(matrix).eigenvectors


def _shortest(run: Callable[[], torch.Tensor], device: str) -> float:
    """Of three runs: what else the machine does makes single ones longer."""
    found: list[float] = []
    with full_precision(torch.device(device)):
        for _ in range(3):
            started = time.perf_counter()
            float(run()[0, 0])  # waits for the device
            found.append(time.perf_counter() - started)
    return min(found)
