"""One merge over several processes: each runs a part of the rows, and sums are taken over all.

Every process takes every step of a merge with the same moments, so all end with the same result.
Torch's default process group must exist; ``accelerate`` or ``torchrun`` creates it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..errors import DeviceError

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process's part: every ``size``-th row starting at ``rank``. ``device`` is where the
    process group's backend can sum (None: wherever a tensor is)."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def mine(self, count: int) -> Sequence[int]:
        """This process's share of ``count`` rows. Raises :class:`IterisError` if a process gets
        none."""
        if count < self.size:
            raise DeviceError(
                f"{count} rows cannot be shared by {self.size} processes; start fewer, or use more "
                "samples."
            )
        return range(self.rank, count, self.size)

    def others(self, count: int) -> Sequence[int]:
        return [row for row in range(count) if row % self.size != self.rank]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes, in place.

        Raises :class:`IterisError` when another process has ended.
        """
        for tensor in tensors:
            self._reduce(tensor)

    def gather(self, rows: Tensor) -> Tensor:
        """The (n, width) rows of all processes, in process order."""
        if self.size == 1:
            return rows
        every: list[Any] = [None] * self.size
        with _still_there():
            distributed.all_gather_object(every, rows.cpu())
        return torch.cat(every).to(rows.device)

    def first(self, value: Value) -> Value:
        """The first process's ``value``, so that all use the same despite different rounding."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        with _still_there():
            distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def least(self, value: int) -> int:
        """The smallest ``value`` over all processes, on which all can agree."""
        smallest = torch.tensor(value)
        self._reduce(smallest, distributed.ReduceOp.MIN)
        return int(smallest)

    def wait(self) -> None:
        """Wait for all processes. Raises :class:`IterisError` if one has ended."""
        if self.size > 1:
            with _still_there():
                distributed.barrier()

    def _reduce(self, tensor: Tensor, op: Any = distributed.ReduceOp.SUM) -> None:
        if self.size == 1:
            return
        moved = tensor.to(self.device or tensor.device)
        with _still_there():
            distributed.all_reduce(moved, op)
        if moved is not tensor:
            tensor.copy_(moved)


ALONE = Processes()


@contextmanager
def _still_there() -> Generator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DeviceError(
            "Another process of this merge has ended, so it cannot go on; nothing was written."
        ) from error
