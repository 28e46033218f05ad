"""The rows of a pipeline: its denoiser's calls while it denoises under each concept's LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..activations.memory import halved, with_less
from ..activations.micro_batch import MicroBatch
from .diffusers_arguments import Arguments, ones_like
from .diffusers_loop import PipelineLoop, StopPipeline
from .protocol import DENOISING, SampleRequest
from .recorded import Call, differ, entries
from .rows import SamplePrompts, TextRows, drawn_steps

_RAN = "denoiser of a row"  # among the arguments kept, none of which has such a name


@dataclass(frozen=True)
class DiffusionSamples:
    """``moving`` holds the arguments that change with the step, (rows, …), in the samples' order;
    ``ran`` is each row's denoiser, as an index among the pipeline's. ``worth``: effective samples
    of a concept."""

    text: TextRows
    arguments: Arguments
    worth: int
    moving: dict[str, Tensor]
    ran: Tensor

    def row(self, row: int) -> Call:
        return {path: value[row] for path, value in self.moving.items()}


def record_rows(
    loop: PipelineLoop,
    arguments: Arguments,
    drawn: SamplePrompts,
    prompts: Sequence[str],
    request: SampleRequest,
) -> DiffusionSamples:
    """Run the pipeline on every prompt under its concept's LoRA, and record its denoiser's
    arguments at some of the steps. With ``latents="noise"`` the denoiser does not run, and every
    step gets the first step's noise. What the request's store has is not run again. A run has its
    ``at_once`` prompts, and half as many whenever memory runs out."""
    calibration, lockstep, store = request.calibration, request.lockstep, request.store
    names = list(loop.denoisers)
    noise, most = calibration.latents == "noise", request.at_once if arguments.fixed_shapes else 1
    samples: dict[int, list[int]] = {}
    states: list[Tensor] = []
    steps: list[Tensor] = []
    for sample, owner in enumerate(drawn.owners):
        samples.setdefault(owner, []).append(sample)
    for owner, own in samples.items():
        generator = drawn.generators[owner]
        for _ in own:  # as if a single draw had made all noise
            states.append(generator.get_state())
            torch.randn(arguments.noise_size, generator=generator)
        steps.append(drawn_steps(len(own), calibration, arguments.steps, generator))
    picks = torch.cat(steps)
    keys = {owner: drawn.key(owner, prompts, lockstep) for owner in samples} if store else {}
    runs = {
        o: [own[at : at + most] for at in range(0, len(own), most)] for o, own in samples.items()
    }
    # the last step does not run
    total = sum(len(rows) * int(picks[rows].max()) for own in runs.values() for rows in own)
    before = reported = 0

    def report(done: int) -> None:
        nonlocal reported
        reported = max(reported, done)  # less in a run that is tried again
        request.tick("drawing noise" if noise else DENOISING, reported, total)

    def denoise(rows: list[int], kept: dict[str, Tensor], first_row: int, before: int) -> None:
        """Run the samples ``rows`` of one concept, whose samples begin at ``first_row``; ``kept``
        gets arguments, (samples, T, …). ``before`` steps are done."""
        step, time, first = -1, Call(), Call()

        def on_call(name: str, call: Call, run: Callable[[], Any]) -> Any:
            nonlocal step, time, first
            report(before + len(rows) * (step + 1))
            now = {path: call[path] for path in arguments.step_args}
            # Several calls of one step: with guidance, of which the first entries are as good as
            # all.
            if step < 0 or any(differ(now[path], time.get(path)) for path in now):
                step, time, first = step + 1, now, first or call
                moving = {path: call[path] for path in arguments.noise_args | arguments.step_args}
                moving |= {path: first[path] for path in arguments.noise_args if noise}
                for index, slot in (picks[rows] == step).nonzero().tolist():
                    at = rows[index] - first_row, slot
                    kept[_RAN][at] = names.index(name)
                    for path, value in entries(moving, arguments.batched, index).items():
                        value = torch.as_tensor(value).detach().cpu()
                        if path not in kept:
                            shape = (*kept[_RAN].shape, *value.shape)
                            kept[path] = torch.zeros(shape, dtype=value.dtype)
                        kept[path][at] = value
            if step >= int(picks[rows].max()):
                raise StopPipeline
            return ones_like(arguments.output_example, len(rows)) if noise else run()

        generators = [torch.Generator() for _ in rows]
        for generator, row in zip(generators, rows, strict=True):
            generator.set_state(states[row])
        loop.run(
            [prompts[row] for row in rows],
            on_call,
            steps=calibration.denoising_steps,
            size=arguments.size,
            generators=generators,
            guidance=1.0 if noise else calibration.guidance,
        )

    def denoise_all(rows: list[int], kept: dict[str, Tensor], size: int) -> None:
        owner, steps = drawn.owners[rows[0]], int(picks[rows].max())
        for at in range(0, len(rows), size):
            some, done = rows[at : at + size], before + at * steps
            run = partial(denoise, some, kept, samples[owner][0], done)
            lockstep.run(MicroBatch(run, [owner], 1, of_one=True))

    def complaint(said: str, tried: Sequence[int]) -> str:
        return (
            f"Out of memory while samples are denoised ({said}). Tried: "
            f"{', '.join(map(str, tried))} at once. Lower latent_size or frames (smaller samples), "
            "or free memory elsewhere. The model is unchanged."
        )

    parts: list[dict[str, Tensor]] = []
    for owner, own in samples.items():
        found = store.get(keys[owner]) if store else None
        kept = found or {_RAN: torch.zeros(len(own), picks.shape[1], dtype=torch.int64)}
        for rows in runs[owner]:
            if not found:
                sizes = halved(min(most, len(rows)))
                _, size = with_less(sizes, partial(denoise_all, rows, kept), complaint)
                most = size if size < len(rows) else most
            before += len(rows) * int(picks[rows].max())
        if store is not None and not found:
            store.put(kept, keys[owner])
        parts.append(kept)
    report(total)
    moving = {
        path: torch.cat([kept[path] for kept in parts]).flatten(0, 1) for path in sorted(parts[0])
    }
    text = drawn.texts(picks.shape[1])
    worth = drawn.effective_samples(text)
    return DiffusionSamples(text, arguments, worth, moving, moving.pop(_RAN))
