"""Latents from ComfyUI's own sampler, for many rows at once: each row with its own text and its own
LoRA. The denoiser's inputs at the selected steps are recorded; they are the rows of a merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..iteris_core.activations.lockstep import Lockstep
from ..iteris_core.activations.micro_batch import MicroBatch
from ..iteris_core.activations.rows import Row, Text
from ..iteris_core.calibration import Calibration
from ..iteris_core.errors import IterisError
from ..iteris_core.hosts.rows import SamplePrompts, drawn_steps
from ..iteris_core.passes.batches import chunks
from .comfy_conds import Inputs, joined, kind
from .comfy_denoiser import SEED, Denoiser
from .comfy_internals import base_of, comfy, memory
from .comfy_state import forget, observable, run_uncompiled
from .comfy_text import Conditioning

_KEY = "iteris"


@dataclass(frozen=True)
class Kept:
    """One denoiser's inputs: ``latents`` (samples, T, …) on ComfyUI's scale, at the steps ``picks``
    (samples, T) of its ``schedule`` of sigmas."""

    latents: Tensor
    picks: Tensor
    schedule: Tensor

    @staticmethod
    def joined(parts: Sequence[Kept]) -> Kept:
        latents, picks = (torch.cat([getattr(p, n) for p in parts]) for n in ("latents", "picks"))
        return Kept(latents, picks, parts[0].schedule)

    @property
    def sigmas(self) -> Tensor:
        """The sigmas of the latents, (samples, T)."""
        return self.schedule[self.picks]


def make_latents(
    denoisers: Sequence[Denoiser],
    boundary: float,
    calibration: Calibration,
    *,
    owner: int,
    count: int,
    texts: Sequence[tuple[Conditioning, Conditioning]],
    guidance: float,
    lockstep: Lockstep,
    rows: int,
    generator: torch.Generator,
    steps_done: Callable[[int, int], None],
) -> list[Kept]:
    """The inputs of each of ``denoisers``: one, or a model's two experts; the second takes over
    when the share of noise is below ``boundary``. Each gets only rows from its own steps.

    There are ``count`` samples of the concept ``owner``, at most ``rows`` in a forward. ``texts``:
    each one's conditioning with the concept's LoRA active, and the empty one; none if only noise is
    drawn. ``steps_done(done, steps)`` gets how many steps of all samples are done, of so many each.
    """
    schedule = denoisers[0].schedule(calibration.denoising_steps)
    parts = _parts(denoisers[0], schedule, boundary, len(denoisers))
    shape = (1, *denoisers[0].shape(calibration)[1:])
    noise = torch.randn(count, *shape[1:], generator=generator)
    made: list[Kept] = []
    for part in parts:
        picks = drawn_steps(count, calibration, len(part) - 1, generator)
        made.append(Kept(torch.empty(*picks.shape, *shape[1:]), picks, part))
    if calibration.latents == "noise":
        for denoiser, kept in zip(denoisers, made, strict=True):
            for row, slot in torch.cartesian_prod(*map(torch.arange, kept.picks.shape)).tolist():
                sigma = kept.sigmas[row, slot]
                kept.latents[row, slot] = denoiser.noised(noise[row : row + 1], sigma)[0]
        return made
    begun, done, steps = None, 0, len(schedule) - 1  # on the scale of a LATENT
    for denoiser, kept in zip(denoisers, made, strict=True):
        ended = torch.empty_like(noise)
        denoiser.close()  # sampling prepares the model again, and releases it
        denoiser.free_memory(0)  # some models compute inputs with their own weights
        own = {id(text): text for pair in texts for text in pair}  # rows of one prompt share one
        by_text = {key: denoiser.inputs(text, shape) for key, text in own.items()}
        inputs = [[by_text[id(text)] for text in pair] for pair in texts]
        kinds = [tuple(map(kind, pair)) for pair in inputs]
        for batch in chunks(range(count), kinds, rows):
            some = torch.as_tensor(list(batch))

            def keep(
                step: int, latents: Tensor, some: Tensor = some, kept: Kept = kept, done: int = done
            ) -> None:
                steps_done(done + len(some) * step, steps)
                row, slot = (kept.picks[some] == step).nonzero(as_tuple=True)
                found = latents[row.to(latents.device)].to("cpu", torch.float32)
                kept.latents[some[row], slot] = found

            guider = RowsGuider(
                denoiser.model,
                denoiser.references.beside(texts[batch[0]][0]),
                *(joined([inputs[row][guided] for row in batch]) for guided in (0, 1)),
                len(batch),
                owner,
                lockstep,
                keep,
            )
            guider.set_cfg(guidance)
            if begun is None:
                empty = denoiser.empty(shape).repeat(len(some), *[1] * (noise.ndim - 1))
                start = noise[some], empty
            else:
                start = torch.zeros_like(noise[some]), begun[some]
            with torch.inference_mode():
                ended[some] = guider.sample(
                    *start,
                    _Euler(whole=begun is None),
                    kept.schedule,
                    denoise_mask=denoiser.references.mask,
                    disable_pbar=True,
                    seed=SEED,
                ).to(ended)
            done += len(batch) * (len(kept.schedule) - 1)
        begun = ended
        steps_done(done, steps)
    return made


class RowsGuider(base_of("comfy.samplers.CFGGuider")):
    """``positive`` and ``negative`` are the inputs of all ``rows``, under the LoRA of the concept
    ``owner``. ``keep(step, latents)`` gets the denoiser's input. Hooks,
    control nets and memory reservation come from ``one`` conditioning."""

    def __init__(
        self,
        model: Any,
        one: list[Any],
        positive: Inputs,
        negative: Inputs,
        rows: int,
        owner: int,
        lockstep: Lockstep,
        keep: Callable[[int, Tensor], None],
    ) -> None:
        super().__init__(model)
        self.set_conds([one], [one])
        self._inputs, self._count = ([negative], [positive]), rows
        self._owner, self._lockstep, self._keep = owner, lockstep, keep
        self._step = 0

    def outer_sample(self, *args: Any, **options: Any) -> Any:
        run_uncompiled(self.model_options)
        comfy.patcher_extension.add_wrapper_with_key(
            comfy.patcher_extension.WrappersMP.APPLY_MODEL,
            _KEY,
            self._with_own_lora,
            self.model_options,
            is_model_options=True,
        )
        with observable(self.model_patcher.model.diffusion_model):
            return super().outer_sample(*args, **options)

    def predict_noise(
        self,
        x: Tensor,
        timestep: Tensor,
        model_options: dict[str, Any] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        memory.throw_exception_if_processing_interrupted()
        self._keep(self._step, x)
        self._step += 1
        return comfy.samplers.sampling_function(
            self.inner_model, x, timestep, *self._inputs, self.cfg, model_options or {}, seed
        )

    def _with_own_lora(self, executor: Any, x: Tensor, *args: Any, **given: Any) -> Any:
        """One forward: all rows once or, with guidance, twice."""
        if len(x) % self._count:
            raise IterisError(
                f"A node on MODEL splits the batch: a forward had {len(x)} of {self._count} rows. "
                "Connect the MODEL from before that node."
            )
        outputs: list[Any] = []

        def run() -> None:
            forget(self.model_patcher.model.diffusion_model)
            outputs.append(executor(x, *args, **given))

        self._lockstep.run(MicroBatch(run, always=[self._owner]))
        return outputs[0]


class _Euler(base_of("comfy.samplers.KSAMPLER")):
    """On ComfyUI's scale, Euler is DDIM without noise. A ``whole`` denoising starts from noise, as
    in DDIM, even if its first step is slightly below the largest sigma."""

    def __init__(self, *, whole: bool) -> None:
        super().__init__(comfy.k_diffusion.sampling.sample_euler)
        self._whole = whole

    def max_denoise(self, model_wrap: Any, sigmas: Tensor) -> bool:
        return self._whole


def _parts(first: Denoiser, schedule: Tensor, boundary: float, count: int) -> list[Tensor]:
    """Each denoiser's schedule; the second starts at the sigma where the first ends."""
    if count == 1:
        return [schedule]
    shares = first.shares(schedule[:-1])
    turn = int((shares >= boundary).sum())
    if not 0 < turn < len(shares):
        raise IterisError(
            f"With boundary {boundary:g} one of the two models gets no step: over {len(shares)} "
            f"steps the share of noise goes from {float(shares[0]):.2f} to {float(shares[-1]):.2f}."
        )
    return [schedule[: turn + 1], schedule[turn:]]


@dataclass(frozen=True)
class DenoiserRows:
    """A denoiser's ``rows``, the latents that they name, (latents, …), on ComfyUI's scale, and
    their sigmas from the ``schedule``."""

    rows: Sequence[Row]
    latents: Tensor
    times: Tensor
    schedule: Tensor


@dataclass(frozen=True)
class ComfySamples:
    """``tokens`` are those of every text; ``noisy`` has one entry per denoiser, whose rows follow
    one another in ``rows``. ``effective_samples``: of a concept."""

    rows: Sequence[Row]
    tokens: Mapping[Text, Any]
    effective_samples: int
    noisy: Sequence[DenoiserRows]


def comfy_samples(
    kept_by: Sequence[Kept], drawn: SamplePrompts, tokenize: Callable[[int, str], Any]
) -> ComfySamples:
    """One row per recorded latent of a denoiser, and those that ``drawn`` adds on them."""
    rows: list[Row] = []
    noisy: list[DenoiserRows] = []
    for kept in kept_by:
        drawn_rows = drawn.rows(kept.picks.shape[1])
        own = [replace(row, number=number) for number, row in enumerate(drawn_rows, len(rows))]
        latents, times = kept.latents.flatten(0, 1), kept.sigmas.flatten()
        noisy.append(DenoiserRows(own, latents, times, kept.schedule))
        rows += own
    tokens = {text: tokenize(*text[:2]) for text in dict.fromkeys(row.text for row in rows)}
    return ComfySamples(rows, tokens, drawn.effective_samples(rows), noisy)
