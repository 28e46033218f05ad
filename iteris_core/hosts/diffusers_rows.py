"""The rows of a pipeline: its denoiser's calls while it denoises under each concept's LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..activations.memory import halved, with_less
from ..activations.micro_batch import MicroBatch
from ..activations.rows import Row
from .diffusers_arguments import Arguments, ones_like
from .diffusers_loop import PipelineLoop, StopPipeline
from .protocol import DENOISING
from .recorded import Call, differ, entries
from .rows import SamplePrompts, drawn_steps

_RAN = "denoiser of a row"  # among the arguments kept, none of which has such a name


@dataclass(frozen=True)
class DiffusionSamples:
    """``moving`` holds the arguments that change with the step, (latents, …); ``ran`` is each
    latent's denoiser, as an index among the pipeline's. ``effective_samples``: of a concept."""

    rows: Sequence[Row]
    arguments: Arguments
    effective_samples: int
    moving: dict[str, Tensor]
    ran: Tensor

    def call(self, row: Row) -> Call:
        """The row's arguments that change with the step."""
        return {path: value[row.latent] for path, value in self.moving.items()}


def record_rows(
    loop: PipelineLoop,
    arguments: Arguments,
    drawn: SamplePrompts,
    prompts: Sequence[str],
    digest_of_base: Callable[[], str | None],
) -> DiffusionSamples:
    """Run the pipeline on every prompt under its concept's LoRA, and record its denoiser's
    arguments at some of the steps. With ``latents="noise"`` the denoiser does not run, and every
    step gets the first step's noise. What the request's store has is not run again. A run has the
    request's ``at_once`` prompts, and half as many whenever memory runs out."""
    request, calibration, names = drawn.request, drawn.request.calibration, list(loop.denoisers)
    noise = calibration.latents == "noise"
    most = request.at_once if arguments.fixed_shapes else 1
    samples: dict[int, list[int]] = {}
    states: list[Tensor] = []
    steps: list[Tensor] = []
    for sample, owner in enumerate(drawn.owners):
        samples.setdefault(owner, []).append(sample)
    for owner, of_concept in samples.items():
        generator = drawn.generators[owner]
        for _ in of_concept:  # as if a single draw had made all noise
            states.append(generator.get_state())
            torch.randn(arguments.noise_size, generator=generator)
        steps.append(drawn_steps(len(of_concept), calibration, arguments.steps, generator))
    picks = torch.cat(steps)
    runs = {
        owner: [of_concept[at : at + most] for at in range(0, len(of_concept), most)]
        for owner, of_concept in samples.items()
    }
    # the last step does not run
    work = {o: sum(len(r) * int(picks[r].max()) for r in of) for o, of in runs.items()}
    total, before, reported = sum(work.values()), 0, 0

    def report(done: int) -> None:
        nonlocal reported
        reported = max(reported, done)  # less in a run that is tried again
        request.tick("drawing noise" if noise else DENOISING, reported, total)

    def denoise(rows: list[int], kept: dict[str, Tensor], first_row: int, before: int) -> None:
        """Run the samples ``rows`` of one concept, whose samples begin at ``first_row``; ``kept``
        gets arguments, (samples, T, …). ``before`` steps are done."""
        step, time, first, last = -1, Call(), Call(), int(picks[rows].max())

        def on_call(name: str, call: Call, run: Callable[[], Any]) -> Any:
            nonlocal step, time, first
            report(before + len(rows) * (step + 1))
            now = {path: call[path] for path in arguments.step_args}
            # Several calls of one step: with guidance, of which the first entries are as good as
            # all.
            if step < 0 or any(differ(now[path], time.get(path)) for path in now):
                step, time, first = step + 1, now, first or call
                moving = {path: (first if noise else call)[path] for path in arguments.noise_args}
                found = (picks[rows] == step).nonzero().tolist()
                moving = tree_map_only(Tensor, Tensor.cpu, moving | now) if found else moving
                for index, slot in found:
                    at = rows[index] - first_row, slot
                    kept[_RAN][at] = names.index(name)
                    for path, value in entries(moving, arguments.batched, index).items():
                        value = torch.as_tensor(value).detach()
                        if path not in kept:
                            shape = (*kept[_RAN].shape, *value.shape)
                            kept[path] = torch.zeros(shape, dtype=value.dtype)
                        kept[path][at] = value
            if step >= last:
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
            done = before + at * steps
            run = partial(denoise, rows[at : at + size], kept, samples[owner][0], done)
            request.lockstep.run(MicroBatch(run, always=[owner]))

    def complaint(said: str, tried: Sequence[int]) -> str:
        return (
            f"Out of memory while samples are denoised ({said}). Tried: "
            f"{', '.join(map(str, tried))} at once. Lower latent_size or frames (smaller samples), "
            "or free memory elsewhere. The model is unchanged."
        )

    tensors, keep = drawn.kept(prompts, digest_of_base)
    before = sum(work[owner] for owner in tensors)
    for owner in [owner for owner in samples if owner not in tensors]:
        kept = {_RAN: torch.zeros(len(samples[owner]), picks.shape[1], dtype=torch.int64)}
        for rows in runs[owner]:
            sizes = halved(min(most, len(rows)))
            _, size = with_less(sizes, partial(denoise_all, rows, kept), complaint)
            most = size if size < len(rows) else most
            before += len(rows) * int(picks[rows].max())
        keep(owner, kept)
    report(total)
    parts = [tensors[owner] for owner in samples]
    moving = {
        path: torch.cat([kept[path] for kept in parts]).flatten(0, 1) for path in sorted(parts[0])
    }
    rows = drawn.rows(picks.shape[1])
    return DiffusionSamples(
        rows, arguments, drawn.effective_samples(rows), moving, moving.pop(_RAN)
    )
