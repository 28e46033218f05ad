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
from .diffusers_arguments import Arguments, ones_like, token_sides
from .diffusers_loop import Enough, PipelineLoop
from .protocol import DENOISING, Tick
from .recorded import Call, differ, entries
from .rows import SamplePrompts, drawn_steps
from .sample_store import SampleStore

_BATCH = 16  # prompts per run of the pipeline
_RAN = "denoiser of a row"  # among the arguments kept, none of which has such a name


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
    drawn: SamplePrompts,
    prompts: Sequence[str],
    lockstep: Lockstep,
    tick: Tick,
    store: SampleStore | None,
) -> RecordedRows:
    """Run the pipeline on every prompt under its concept's LoRA, and record its denoiser's
    arguments at some of the steps. With ``latents="noise"`` the denoiser does not run, and every
    step gets the first step's noise. What ``store`` has is not run again."""
    calibration, owners = drawn.calibration, drawn.owners
    noise, names = calibration.latents == "noise", list(loop.denoisers)
    samples = {owner: [*own] for owner, own in groupby(range(len(owners)), owners.__getitem__)}
    generators: list[torch.Generator] = []
    steps: list[Tensor] = []
    for owner, own in samples.items():
        generator = drawn.generators[owner]
        generators += _generators(len(own), arguments.numbers, generator)
        steps.append(drawn_steps(len(own), calibration, arguments.steps, generator))
    picks = torch.cat(steps)
    keys = {owner: drawn.key(owner, prompts, lockstep) for owner in samples} if store else {}
    known = {owner: store.get(key) for owner, key in keys.items()} if store else {}
    most = _BATCH if arguments.alike else 1
    runs = {
        owner: [own[start : start + most] for start in range(0, len(own), most)]
        for owner, own in samples.items()
    }
    # the last step does not run
    total = sum(len(rows) * int(picks[rows].max()) for own in runs.values() for rows in own)
    before = 0

    def report(done: int) -> None:
        tick("drawing noise" if noise else DENOISING, done, total)

    def denoise(rows: list[int], kept: dict[str, Tensor], first_row: int) -> None:
        """Run the samples ``rows`` of one concept, whose samples begin at ``first_row``."""
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
                        at = row - first_row, slot
                        _keep(kept, at, moving, arguments, index)
                        kept[_RAN][at] = names.index(name)
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

    parts: list[dict[str, Tensor]] = []
    for owner, own in samples.items():
        found = known.get(owner)
        kept = found or {_RAN: torch.zeros(len(own), picks.shape[1], dtype=torch.int64)}
        for rows in runs[owner]:
            if not found:
                run = partial(denoise, rows, kept, own[0])
                lockstep.run(MicroBatch(run, [owner], 1, of_one=True))
            before += len(rows) * int(picks[rows].max())
        if store is not None and not found:
            store.put(kept, keys[owner])
        parts.append(kept)
    report(total)
    moving = {
        path: torch.cat([kept[path] for kept in parts]).flatten(0, 1) for path in sorted(parts[0])
    }
    return RecordedRows(picks.shape[1], moving, moving.pop(_RAN), names)


def _generators(count: int, numbers: int, generator: torch.Generator) -> Iterator[torch.Generator]:
    """One generator per sample, as if a single draw from ``generator`` had made all noise."""
    for _ in range(count):
        own = torch.Generator()
        own.set_state(generator.get_state())
        torch.randn(numbers, generator=generator)
        yield own


def _keep(
    kept: dict[str, Tensor],
    at: tuple[int, int],
    moving: Call,
    arguments: Arguments,
    row: int,
) -> None:
    """Copy a row of a call's ``moving`` arguments to its place in ``kept``, (samples, T, …)."""
    for path, value in entries(moving, arguments.batched, row).items():
        value = torch.as_tensor(value).detach().cpu()
        if path not in kept:
            kept[path] = torch.zeros((*kept[_RAN].shape, *value.shape), dtype=value.dtype)
        kept[path][at] = value
