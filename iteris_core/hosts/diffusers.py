"""A text-to-image pipeline of diffusers as host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..activations.lockstep import Lockstep, MicroBatch
from ..activations.meter import free_memory, usable
from ..architectures import text as text_wirings
from ..architectures.record import Conditioning
from ..architectures.sites import in_changed_parts, residual_streams
from ..concepts import Calibration, Concept
from ..lora import Lora
from ..lora_files import ReadOptions
from .diffusers_lora import COMPONENTS, base_of, calls_of, pipeline_sites, read_lora
from .diffusers_noise import deterministic_scheduler
from .protocol import Stage, Tick, check_eval, check_model
from .rows import NoisyRows, TextRows, drawn_prompts, drawn_steps, noisy_rows

_BATCH = 16  # rows per forward while samples are made
_GUIDANCE = 3.5  # what FLUX pipelines give a model that takes it as an input


@dataclass(frozen=True)
class DiffusionSamples:
    """``noisy`` is None where no site needs the denoiser to run; ``guidance`` is what a
    guidance-distilled model is given."""

    text: TextRows
    noisy: NoisyRows | None
    guidance: float


class DiffusersHost:
    """Merges on a pipeline of SD 1.x, 2.x, SDXL, SD 3, 3.5 or FLUX.1, or of their shapes.

    The pipeline is only run: no weight, adapter or scheduler of it is changed. Its text encoders
    are one stage and its denoiser another. Raises :class:`IterisError` for other pipelines and
    where a part is missing.
    """

    pictures = True

    def __init__(self, pipeline: Any) -> None:
        self._sites = pipeline_sites(pipeline)
        self.architecture = base_of(pipeline, self._sites).architecture
        self.calls = calls_of(pipeline, self.architecture)
        self.pipeline = pipeline
        for model in self._models():
            check_model(model)
        self._direct = {site for site in self._sites if self._sees_text_only(site)}
        self._encoded: list[list[Conditioning]] = []

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.architecture.denoiser)

    def _models(self) -> list[nn.Module]:
        parts = [getattr(self.pipeline, name, None) for name in COMPONENTS]
        return [part for part in parts if isinstance(part, nn.Module)]

    @property
    def device(self) -> torch.device:
        return torch.device(self.pipeline._execution_device)

    def sites(self) -> Mapping[str, nn.Module]:
        return self._sites

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        return read_lora(self.pipeline, self._sites, Path(path), options)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        tokenizer = self.pipeline.tokenizer
        found = tokenizer(list(prompts), truncation=True, max_length=tokenizer.model_max_length)
        return [len(ids) for ids in found.input_ids]

    def learned(self, prompt: str) -> Set[str]:
        tokenizer = self.pipeline.tokenizer
        added = set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
        return added & set(tokenizer.tokenize(prompt))

    def samples(
        self,
        concepts: Sequence[Concept],
        sites: Set[str],
        calibration: Calibration,
        lockstep: Lockstep,
        generator: torch.Generator,
        tick: Tick,
    ) -> DiffusionSamples:
        for model in self._models():
            check_eval(model)
        share = calibration.empty_share if self.calls.empty_prompts else 0.0
        guidance = calibration.guidance if calibration.guidance > 1 else _GUIDANCE
        denoises = self._needs_denoiser(sites)
        empty = bool(share) and not denoises
        owners, prompts = drawn_prompts(concepts, calibration, generator, empty)
        if not denoises:
            return DiffusionSamples(TextRows.of(owners, prompts), None, guidance)
        latents, times = self._latents(prompts, owners, calibration, lockstep, generator, tick)
        text, noisy = noisy_rows(owners, prompts, latents, times, share, generator)
        return DiffusionSamples(text, noisy, guidance)

    def forward(self, samples: DiffusionSamples, rows: Sequence[int]) -> Tensor:
        text, noisy = samples.text, samples.noisy
        encoded = self._encode([text.texts[text.text_rows[row]] for row in rows])
        if noisy is None:
            return encoded["states"]
        index = torch.as_tensor(list(rows))
        return self._predict(noisy.latents[index], noisy.times[index], encoded, samples.guidance)

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        streams: dict[str, nn.Module] = {}
        for component in sorted({site.partition(".")[0] for site in sites}):
            if component.startswith("text_encoder"):
                encoder = getattr(self.pipeline, component)
                known = residual_streams(encoder, self._sites, text_wirings.WIRINGS)
                streams |= in_changed_parts(known, sites)
        if self._needs_denoiser(sites):
            wirings = self.architecture.wirings
            streams |= residual_streams(self.denoiser, self._sites, wirings)
        return streams

    def stages(self, samples: DiffusionSamples, sites: Set[str]) -> Iterator[Stage]:
        text_sites = [site for site in sites if site.startswith("text_encoder")]
        others = [site for site in sites if site.startswith(f"{self.architecture.denoiser}.")]
        if not others and not text_sites:
            return
        text = samples.text
        self._encoded = [[{}] * len(text.texts) for _ in range(2)]
        if text_sites:
            run = partial(self._run_text, text)
            yield Stage("text encoder", text_sites, text.text_owners, run, feeds=bool(others))
        else:
            prompts = list(dict.fromkeys(text.texts))
            run = partial(self._run_plain_text, text, prompts)
            yield Stage("text encoder", [], [0] * len(prompts), run, feeds=True)
        if samples.noisy is not None:
            run = partial(self._run_denoiser, text, samples.noisy, samples.guidance)
            yield Stage(self.architecture.denoiser, others, text.owners, run, places=True)
        elif others:
            run = partial(self._run_projections, [self._sites[site] for site in others])
            yield Stage("cross-attention", others, text.text_owners, run)
        self._encoded = []

    def room(self, wanted: int) -> int:
        return usable(free_memory(self.device))

    def _needs_denoiser(self, sites: Set[str]) -> bool:
        prefix = f"{self.architecture.denoiser}."
        return any(site.startswith(prefix) and site not in self._direct for site in sites)

    def _sees_text_only(self, site: str) -> bool:
        """Whether a site's input is the text embedding itself, whatever the latents are."""
        parent_name, _, leaf = site.rpartition(".")
        if leaf not in ("to_k", "to_v") or not parent_name.startswith("unet."):
            return False
        unet = self.pipeline.unet
        attention = unet.get_submodule(parent_name.removeprefix("unet."))
        return (
            bool(getattr(attention, "is_cross_attention", False))
            and not getattr(attention, "norm_cross", None)
            and getattr(unet, "encoder_hid_proj", None) is None
        )

    def _encode(self, prompts: list[str]) -> Conditioning:
        return self.calls.encode(self.pipeline, prompts)

    def _predict(
        self, latents: Tensor, timesteps: Tensor, text: Conditioning, guidance: float
    ) -> Tensor:
        """The denoiser's output, rows first."""
        latents = latents.to(self.device, self.denoiser.dtype)
        text = {name: part.to(latents) for name, part in text.items()}
        arguments = self.calls.arguments(
            self.pipeline, latents, timesteps.to(self.device), text, guidance
        )
        return self.denoiser(**arguments, return_dict=False)[0]

    def _run_text(self, text: TextRows, rows: Sequence[int], copies: int) -> None:
        parts = self._encoded_parts([text.texts[row] for row in rows] * copies)
        for copy in range(copies):
            for row in rows:
                self._encoded[copy][row] = next(parts)

    def _run_plain_text(
        self, text: TextRows, prompts: Sequence[str], rows: Sequence[int], copies: int
    ) -> None:
        """Text encoders that no LoRA changes give the same for every concept, and merged."""
        chosen = [prompts[row] for row in rows]
        parts = dict(zip(chosen, self._encoded_parts(chosen), strict=True))
        for copy in self._encoded:
            copy[:] = [parts.get(t, there) for t, there in zip(text.texts, copy, strict=True)]

    def _encoded_parts(self, prompts: list[str]) -> Iterator[Conditioning]:
        """What the text encoders give for each of ``prompts``."""
        encoded = self._encode(prompts)
        for row in range(len(prompts)):
            yield {name: part[row].cpu() for name, part in encoded.items()}

    def _text_batch(self, rows: Sequence[int], copies: int) -> Conditioning:
        parts = [self._encoded[copy][row] for copy in range(copies) for row in rows]
        return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}

    def _run_denoiser(
        self, text: TextRows, noisy: NoisyRows, guidance: float, rows: Sequence[int], copies: int
    ) -> None:
        index = torch.as_tensor(list(rows) * copies)
        encoded = self._text_batch([text.text_rows[row] for row in rows], copies)
        self._predict(noisy.latents[index], noisy.times[index], encoded, guidance)

    def _run_projections(
        self, modules: Sequence[nn.Module], rows: Sequence[int], copies: int
    ) -> None:
        text = self._text_batch(rows, copies)["states"].to(self.device, self.denoiser.dtype)
        for module in modules:
            module(text)

    def _latents(
        self,
        prompts: list[str],
        owners: list[int],
        calibration: Calibration,
        lockstep: Lockstep,
        generator: torch.Generator,
        tick: Tick,
    ) -> tuple[Tensor, Tensor]:
        """Latents (prompts, T, …) and their timesteps (prompts, T)."""
        steps = calibration.denoising_steps
        shape = self.calls.latent_shape(self.pipeline, calibration.latent_size)
        patch = self.denoiser.config.get("patch_size", 1)
        scheduler_now = partial(
            deterministic_scheduler,
            *(self.pipeline.scheduler, steps, shape, patch, self.calls.even_sigmas),
        )
        times = scheduler_now().timesteps
        noise = torch.randn(len(prompts), *shape, generator=generator)
        picks = drawn_steps(len(prompts), calibration, steps, generator)
        count = picks.shape[1]
        if calibration.latents == "noise":
            kept = noise[:, None].expand(-1, count, *(-1 for _ in shape))
            return kept, times[picks]

        kept = torch.zeros(len(prompts), count, *shape)
        mine = lockstep.processes.mine(len(prompts))
        chunks = [mine[start : start + _BATCH] for start in range(0, len(mine), _BATCH)]
        tick("denoising samples", 0, len(chunks))
        for done, chunk in enumerate(chunks, 1):
            predict = self._own_predict(
                [prompts[row] for row in chunk],
                [owners[row] for row in chunk],
                calibration.guidance,
                lockstep,
            )
            index, scheduler = torch.as_tensor(list(chunk)), scheduler_now()
            noisy = noise[index].to(self.device, self.denoiser.dtype)
            for step, time in enumerate(times):
                row, slot = (picks[index] == step).nonzero(as_tuple=True)
                kept[index[row], slot] = noisy[row.to(noisy.device)].to("cpu", kept.dtype)
                noisy = scheduler.step(predict(noisy, time), time, noisy, return_dict=False)[0]
            tick("denoising samples", done, len(chunks))
        lockstep.processes.add_up([kept])
        return kept, times[picks]

    def _own_predict(
        self, prompts: list[str], owners: list[int], guidance: float, lockstep: Lockstep
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """The denoiser's output for each row under its own LoRA, with guidance."""
        guided = self.calls.empty_prompts and guidance > 1
        copies = 2 if guided else 1
        scale = guidance if guidance > 1 else _GUIDANCE
        result: list[Any] = []

        def own(call: Callable[[], Any]) -> Any:
            lockstep.run(MicroBatch(lambda: result.append(call()), owners * copies, 1))
            return result.pop()

        text = own(lambda: self._encode(prompts + [""] * len(prompts) * guided))

        def predict(latents: Tensor, timestep: Tensor) -> Tensor:
            batch = torch.cat([latents] * copies)
            timesteps = timestep.expand(len(batch))
            output = own(lambda: self._predict(batch, timesteps, text, scale))
            if guided:
                positive, negative = output.chunk(2)
                output = negative + guidance * (positive - negative)
            return output

        return predict
