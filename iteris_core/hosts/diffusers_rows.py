"""The rows of a pipeline: its denoiser's calls while it denoises under each concept's LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.micro_batch import MicroBatch
from ..concepts import Calibration
from .diffusers_arguments import Arguments, ones_like, token_sides
from .diffusers_loop import Enough, PipelineLoop
from .protocol import DENOISING, Tick
from .recorded import Call, differ, entries
from .rows import drawn_steps

_BATCH = 16  # prompts per run of the pipeline


@dataclass(frozen=True)
class RecordedRows:
    """``each`` rows per sample, in the samples' order. ``moving`` holds the arguments that change
    with the step, (rows, …); ``ran`` is each row's denoiser, as an index into ``names``."""

    each: int
    moving: dict[str, Tensor]
    ran: Tensor
    names: Sequence[str]

    def row(self, row: int) -> Call:
        return {path: value[row] for path, value in self.moving.items()}

    def picture(self, drawn: Set[str]) -> Sequence[int] | None:
        """(…, height, width) of the single ``drawn`` argument: channels first, or square tokens."""
        shapes = [tuple(self.moving[path].shape[1:]) for path in drawn]
        if len(shapes) != 1:
            return None
        (shape,) = shapes
        side = isqrt(shape[0])
        if len(shape) == 2 and side**2 == shape[0]:
            return side, side
        return shape[1:] if len(shape) >= 3 else None

    def patches(self, drawn: Set[str], denoiser: Any) -> Sequence[int]:
        """Sides of a token's patch, in units of :meth:`picture`; packed latents are tokens."""
        packed = any(self.moving[path].ndim == 3 for path in drawn)
        return (1,) if packed else sorted(set(token_sides(denoiser)))

    def denoiser(self, row: int) -> str:
        return self.names[int(self.ran[row])]

    def rows_of(self, name: str) -> list[int]:
        return (self.ran == self.names.index(name)).nonzero().flatten().tolist()


def record_rows(
    loop: PipelineLoop,
    arguments: Arguments,
    owners: Sequence[int],
    prompts: Sequence[str],
    calibration: Calibration,
    lockstep: Lockstep,
    generator: torch.Generator,
    tick: Tick,
) -> RecordedRows:
    """Run the pipeline on every prompt under its concept's LoRA, and record its denoiser's
    arguments at some of the steps. With ``latents="noise"`` the denoiser does not run, and every
    step gets the first step's noise."""
    generators = list(_generators(len(prompts), arguments.numbers, generator))
    picks = drawn_steps(len(prompts), calibration, arguments.steps, generator)
    runs = list(_runs(owners, _BATCH if arguments.alike else 1))
    totals = [len(rows) * int(picks[rows].max()) for rows in runs]  # the last step does not run
    noise = calibration.latents == "noise"
    names, ran = list(loop.denoisers), torch.zeros(picks.shape, dtype=torch.int64)
    kept: dict[str, Tensor] = {}

    def report(done: int) -> None:
        tick("drawing noise" if noise else DENOISING, done, sum(totals))

    def denoise(rows: list[int], before: int) -> None:
        """Run the samples ``rows``, after ``before`` sample steps of earlier runs."""
        step, time, first = -1, Call(), Call()

        def see(name: str, call: Call, run: Callable[[], Any]) -> Any:
            nonlocal step, time, first
            report(before + len(rows) * (step + 1))
            now = {path: call[path] for path in arguments.timed}
            # Several calls of one step: with guidance, of which the first entries are as good as
            # all.
            if step < 0 or any(differ(now[path], time.get(path)) for path in now):
                step, time, first = step + 1, now, first or call
                moving = {path: call[path] for path in arguments.moving}
                moving |= {path: first[path] for path in arguments.drawn if noise}
                for index, row in enumerate(rows):
                    for slot in (picks[row] == step).nonzero().flatten().tolist():
                        _keep(kept, picks.shape, (row, slot), moving, arguments, index)
                        ran[row, slot] = names.index(name)
            if step >= int(picks[rows].max()):
                raise Enough
            return ones_like(arguments.given, len(rows)) if noise else run()

        loop.run(
            [prompts[row] for row in rows],
            see,
            steps=calibration.denoising_steps,
            size=arguments.size,
            generators=[generators[row] for row in rows],
            guidance=1.0 if noise else calibration.guidance,
        )

    for number, rows in enumerate(runs):
        run = partial(denoise, rows, sum(totals[:number]))
        lockstep.run(MicroBatch(run, [owners[rows[0]]], 1, of_one=True))
    report(sum(totals))
    moving = {path: of_path.flatten(0, 1) for path, of_path in sorted(kept.items())}
    return RecordedRows(picks.shape[1], moving, ran.flatten(), names)


def _generators(count: int, numbers: int, generator: torch.Generator) -> Iterator[torch.Generator]:
    """One generator per sample, as if a single draw from ``generator`` had made all noise."""
    for _ in range(count):
        own = torch.Generator()
        own.set_state(generator.get_state())
        torch.randn(numbers, generator=generator)
        yield own


def _runs(owners: Sequence[int], most: int) -> Iterator[list[int]]:
    """The rows of one concept in groups of at most that size."""
    for _, own in groupby(range(len(owners)), key=owners.__getitem__):
        some = list(own)
        yield from (some[start : start + most] for start in range(0, len(some), most))


def _keep(
    kept: dict[str, Tensor],
    shape: Sequence[int],
    at: tuple[int, int],
    moving: Call,
    arguments: Arguments,
    row: int,
) -> None:
    """Copy a row of a call's ``moving`` arguments to its place in ``kept``, (samples, T, …)."""
    for path, value in entries(moving, arguments.batched, row).items():
        value = torch.as_tensor(value).detach().cpu()
        if path not in kept:
            kept[path] = torch.zeros((*shape, *value.shape), dtype=value.dtype)
        kept[path][at] = value
