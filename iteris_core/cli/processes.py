"""One merge over the processes that ``accelerate launch`` or ``torchrun`` have started."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch

from ..activations.processes import ALONE, Processes
from .common import best_device


@contextmanager
def processes(device: str | None) -> Generator[tuple[Processes, str]]:
    """This process's part, and its device."""
    device = device or best_device()
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE, device
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    own = torch.device("cpu" if state.device is None else state.device)
    try:
        group = Processes(state.process_index, state.num_processes, own)
        yield group, str(own)
    finally:
        state.destroy_process_group()
