"""One merge over several processes: each runs a part of the rows, and sums are made over all.

Every process takes every step of a merge with the same moments, so all of them end with the same
result. Torch's default process group has to be there; ``accelerate`` or ``torchrun`` make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed

from ..errors import IterisError

_SMALL = 1 << 16  # entries; tensors up to this size travel together


@dataclass(frozen=True)
class Shards:
    """This process's part: every ``size``-th row from ``rank`` on. ``device`` is where the process
    group's backend can add up (None: where a tensor is)."""

    rank: int = 0
    size: int = 1
    device: torch.device | None = None

    def mine(self, count: int) -> Sequence[int]:
        """This process's of ``count`` rows. Raises :class:`IterisError` if a process gets none."""
        if count < self.size:
            raise IterisError(
                f"{count} rows cannot be shared by {self.size} processes; start fewer, or take "
                "more samples."
            )
        return range(self.rank, count, self.size)

    def others(self, count: int) -> Sequence[int]:
        return [row for row in range(count) if row % self.size != self.rank]

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over all processes, in place.

        Raises :class:`IterisError` when another process has ended.
        """
        if self.size == 1:
            return
        small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() <= _SMALL:
                small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
            else:
                self._sum(tensor)
        for some in small.values():
            joined = torch.cat([tensor.reshape(-1) for tensor in some])
            self._sum(joined)
            for tensor, part in zip(some, joined.split([t.numel() for t in some]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def gather(self, rows: Tensor) -> Tensor:
        """The (some, width) rows of all processes, in the order of processes."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64)
        counts[self.rank] = len(rows)
        self.add_up([counts])
        start = int(counts[: self.rank].sum())
        every = rows.new_zeros(int(counts.sum()), rows.shape[1])
        every[start : start + len(rows)] = rows
        self.add_up([every])
        return every

    def least(self, value: int) -> int:
        """The smallest ``value`` of all processes: what they have to agree on."""
        every = torch.zeros(self.size, dtype=torch.int64)
        every[self.rank] = value
        self.add_up([every])
        return int(every.min())

    def wait(self) -> None:
        """Until all processes are here. Raises :class:`IterisError` when one has ended."""
        self.add_up([torch.zeros(1, device=self.device)])

    def _sum(self, tensor: Tensor) -> None:
        moved = tensor.to(self.device or tensor.device)
        try:
            distributed.all_reduce(moved)
        except RuntimeError as error:
            raise IterisError(
                "Another process of this merge has ended, so it cannot go on; nothing was written."
            ) from error
        if moved is not tensor:
            tensor.copy_(moved)


ALONE = Shards()
