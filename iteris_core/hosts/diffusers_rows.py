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
    steps = [len(rows) * int(picks[rows].max()) for rows in runs]  # the last step does not run
    noise = calibration.latents == "noise"

    def report(done: int) -> None:
        tick("drawing noise" if noise else DENOISING, done, sum(steps))

    record = _Record(loop, arguments, picks, report, noise=noise)

    def denoise(rows: Sequence[int], before: int) -> None:
        record.begin(rows, before)
        loop.run(
            [prompts[row] for row in rows],
            record.see,
            steps=calibration.denoising_steps,
            size=arguments.size,
            generators=[generators[row] for row in rows],
            guidance=1.0 if noise else calibration.guidance,
        )

    for number, rows in enumerate(runs):
        run = partial(denoise, rows, sum(steps[:number]))
        lockstep.run(MicroBatch(run, [owners[rows[0]]], 1, of_one=True))
    report(sum(steps))
    return record.rows()


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


class _Record:
    """``picks`` are the steps to keep, (samples, T), ascending; ``report`` gets the number of
    finished sample steps."""

    def __init__(
        self,
        loop: PipelineLoop,
        arguments: Arguments,
        picks: Tensor,
        report: Callable[[int], None],
        *,
        noise: bool,
    ) -> None:
        self._arguments, self._picks, self._report, self._noise = arguments, picks, report, noise
        self._names = list(loop.denoisers)
        self._kept: dict[str, Tensor] = {}
        self._ran = torch.zeros(picks.shape, dtype=torch.int64)

    def begin(self, rows: Sequence[int], before: int) -> None:
        """Begin a run on the samples ``rows``, after ``before`` sample steps of earlier runs."""
        self._rows, self._before = rows, before
        self._step = -1
        self._time: Call = {}
        self._first: Call = {}

    def see(self, name: str, call: Call, run: Callable[[], Any]) -> Any:
        """Record one call of a denoiser."""
        rows = list(self._rows)
        self._report(self._before + len(rows) * (self._step + 1))
        time = {path: call[path] for path in self._arguments.timed}
        # Several calls of one step: with guidance, of which the first entries are as good as all.
        if self._step < 0 or any(differ(time[path], self._time.get(path)) for path in time):
            self._step, self._time = self._step + 1, time
            self._first = self._first or call
            self._keep(name, call)
        if self._step >= int(self._picks[rows].max()):
            raise Enough
        return ones_like(self._arguments.given, len(rows)) if self._noise else run()

    def _keep(self, name: str, call: Call) -> None:
        arguments = self._arguments
        if self._noise:
            call = {**call, **{path: self._first[path] for path in arguments.drawn}}
        moving = {path: call[path] for path in arguments.moving}
        for index, row in enumerate(self._rows):
            for slot in (self._picks[row] == self._step).nonzero().flatten().tolist():
                entry = entries(moving, arguments.batched, index)
                for path, value in entry.items():
                    value = torch.as_tensor(value).detach().cpu()
                    if path not in self._kept:
                        shape = (*self._picks.shape, *value.shape)
                        self._kept[path] = torch.zeros(shape, dtype=value.dtype)
                    self._kept[path][row, slot] = value
                self._ran[row, slot] = self._names.index(name)

    def rows(self) -> RecordedRows:
        moving = {path: kept.flatten(0, 1) for path, kept in sorted(self._kept.items())}
        return RecordedRows(self._picks.shape[1], moving, self._ran.flatten(), self._names)
