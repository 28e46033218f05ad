"""A Stable Diffusion pipeline of diffusers as host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Calibration, Concept, concept_prompts
from ..errors import IterisError
from ..lockstep import Lockstep, MicroBatch
from ..lora import Lora
from ..lora_files import ReadOptions
from . import Stage, Tick
from .diffusers_lora import read_lora
from .diffusers_sites import named_sites
from .streams import unet_streams

_BATCH = 16  # rows per forward while samples are made


@dataclass(frozen=True)
class DiffusionSamples:
    """Rows of the denoiser, sorted by concept.

    ``text_owners`` and ``text_prompts`` list the distinct (concept, prompt) pairs, and
    ``text_rows`` says which of them each row uses. ``latents`` is (rows, channels, height, width),
    ``timesteps`` (rows,); both are None where no site needs the denoiser to run.
    """

    text_owners: Sequence[int]
    text_prompts: Sequence[str]
    owners: Sequence[int]
    text_rows: Sequence[int]
    latents: Tensor | None
    timesteps: Tensor | None


class DiffusersHost:
    """Merges on a ``StableDiffusionPipeline`` (SD 1.x and 2.x, or of that shape).

    The pipeline is only run: no weight, adapter or scheduler of it is changed.
    """

    def __init__(self, pipeline: Any) -> None:
        for part in ("unet", "text_encoder", "tokenizer", "scheduler"):
            if getattr(pipeline, part, None) is None:
                raise IterisError(
                    f"{type(pipeline).__name__} has no {part}; this host merges on "
                    "StableDiffusionPipeline. Load the whole pipeline."
                )
        self.pipeline = pipeline
        self._sites = {
            **named_sites("unet", pipeline.unet),
            **named_sites("text_encoder", pipeline.text_encoder),
        }
        self._direct = {site for site in self._sites if self._sees_text_only(site)}
        self._embeddings: list[list[Tensor | None]] = []

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

    def samples(
        self,
        concepts: Sequence[Concept],
        sites: Set[str],
        calibration: Calibration,
        lockstep: Lockstep,
        generator: torch.Generator,
        tick: Tick,
    ) -> DiffusionSamples:
        prompts = [concept_prompts(concept, calibration, generator) for concept in concepts]
        if not self._needs_denoiser(sites) and calibration.empty_share:
            prompts = [[*some, ""] for some in prompts]
        owners = [i for i, some in enumerate(prompts) for _ in some]
        flat = [prompt for some in prompts for prompt in some]
        if not self._needs_denoiser(sites):
            return _rows(owners, flat, None, None)

        latents, timesteps = self._latents(
            flat, owners, calibration, lockstep, generator, tick
        )  # (prompts, T, …) and (prompts, T)
        count = timesteps.shape[1]
        row_owners = [owner for owner in owners for _ in range(count)]
        row_prompts = [prompt for prompt in flat for _ in range(count)]
        empty = torch.rand(len(row_owners), generator=generator) < calibration.empty_share
        for row in empty.nonzero().flatten().tolist():
            row_prompts[row] = ""
        return _rows(row_owners, row_prompts, latents.flatten(0, 1), timesteps.flatten())

    def forward(self, samples: DiffusionSamples, rows: Sequence[int]) -> Tensor:
        text = self._encode([samples.text_prompts[samples.text_rows[row]] for row in rows])
        if samples.latents is None or samples.timesteps is None:
            return text
        unet, index = self.pipeline.unet, torch.as_tensor(list(rows))
        return unet(
            samples.latents[index].to(self.device, unet.dtype),
            samples.timesteps[index].to(self.device),
            encoder_hidden_states=text,
            return_dict=False,
        )[0]

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        return unet_streams(self.pipeline.unet, self._sites) if self._needs_denoiser(sites) else {}

    def stages(self, samples: DiffusionSamples, sites: Set[str]) -> Iterator[Stage]:
        text_sites = [site for site in sites if site.startswith("text_encoder.")]
        unet_sites = [site for site in sites if site.startswith("unet.")]
        if not unet_sites and not text_sites:
            return
        self._embeddings = [[None] * len(samples.text_prompts) for _ in range(2)]
        yield Stage("text encoder", text_sites, samples.text_owners, self._run_text(samples))
        if self._needs_denoiser(sites):
            yield Stage("unet", unet_sites, samples.owners, self._run_unet(samples))
        elif unet_sites:
            run = self._run_projections(unet_sites)
            yield Stage("cross-attention", unet_sites, samples.text_owners, run)
        self._embeddings = []

    def _needs_denoiser(self, sites: Set[str]) -> bool:
        return any(site.startswith("unet.") and site not in self._direct for site in sites)

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

    def _encode(self, prompts: list[str]) -> Tensor:
        """(rows, 77, width)"""
        return self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]

    def _run_text(self, samples: DiffusionSamples) -> Any:
        def run(rows: Sequence[int], copies: int) -> None:
            encoded = self._encode([samples.text_prompts[row] for row in rows] * copies)
            for copy in range(copies):
                for index, row in enumerate(rows):
                    self._embeddings[copy][row] = encoded[copy * len(rows) + index]

        return run

    def _text_batch(self, rows: Sequence[int], copies: int) -> Tensor:
        found = [self._embeddings[copy][row] for copy in range(copies) for row in rows]
        return torch.stack([embedding for embedding in found if embedding is not None])

    def _run_unet(self, samples: DiffusionSamples) -> Any:
        unet = self.pipeline.unet
        assert samples.latents is not None
        assert samples.timesteps is not None
        latents, timesteps = samples.latents, samples.timesteps

        def run(rows: Sequence[int], copies: int) -> None:
            index = torch.as_tensor(list(rows) * copies)
            text = self._text_batch([samples.text_rows[row] for row in rows], copies)
            unet(
                latents[index].to(self.device, unet.dtype),
                timesteps[index].to(self.device),
                encoder_hidden_states=text,
                return_dict=False,
            )

        return run

    def _run_projections(self, sites: Sequence[str]) -> Any:
        modules = [module for site, module in self._sites.items() if site in set(sites)]

        def run(rows: Sequence[int], copies: int) -> None:
            text = self._text_batch(rows, copies)
            for module in modules:
                module(text)

        return run

    def _latents(
        self,
        prompts: list[str],
        owners: list[int],
        calibration: Calibration,
        lockstep: Lockstep,
        generator: torch.Generator,
        tick: Tick,
    ) -> tuple[Tensor, Tensor]:
        """Latents (prompts, T, channels, size, size) and their timesteps (prompts, T)."""
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        unet = self.pipeline.unet
        scheduler: Any = DDIMScheduler.from_config(self.pipeline.scheduler.config)
        steps, wanted = calibration.denoising_steps, calibration.timesteps
        scheduler.set_timesteps(steps)
        size = calibration.latent_size or unet.config.sample_size
        noise = torch.randn(len(prompts), unet.config.in_channels, size, size, generator=generator)
        picks = torch.stack(
            [torch.randperm(steps, generator=generator)[:wanted] for _ in prompts]
        ).sort(dim=1)[0]
        if calibration.latents == "noise":
            kept = noise[:, None].expand(-1, wanted, -1, -1, -1)
            return kept, scheduler.timesteps[picks]

        kept = torch.empty(len(prompts), wanted, *noise.shape[1:])
        chunks = [
            range(start, min(start + _BATCH, len(prompts)))
            for start in range(0, len(prompts), _BATCH)
        ]
        tick("denoising samples", 0, len(chunks))
        for done, chunk in enumerate(chunks, 1):
            rows = list(chunk)
            self._denoise(
                [prompts[row] for row in rows],
                [owners[row] for row in rows],
                noise[rows],
                picks[rows],
                scheduler,
                calibration.guidance,
                lockstep,
                kept[chunk.start : chunk.stop],
            )
            tick("denoising samples", done, len(chunks))
        return kept, scheduler.timesteps[picks]

    def _denoise(
        self,
        prompts: list[str],
        owners: list[int],
        noise: Tensor,
        picks: Tensor,
        scheduler: Any,
        guidance: float,
        lockstep: Lockstep,
        kept: Tensor,
    ) -> None:
        """Denoise each row under its own LoRA; write the latents of the picked steps to kept."""
        unet = self.pipeline.unet
        guided = guidance > 1
        copies = 2 if guided else 1
        result: list[Tensor] = []

        def forward(call: Any) -> Tensor:
            lockstep.run(MicroBatch(lambda: result.append(call()), owners * copies, 1))
            return result.pop()

        text = forward(lambda: self._encode(prompts + [""] * len(prompts) * guided))
        latents = noise.to(self.device, unet.dtype) * scheduler.init_noise_sigma
        for step, timestep in enumerate(scheduler.timesteps):
            row, slot = (picks == step).nonzero(as_tuple=True)
            kept[row, slot] = latents[row.to(latents.device)].to("cpu", kept.dtype)
            batch = torch.cat([latents] * copies)
            batch = scheduler.scale_model_input(batch, timestep)
            output = forward(
                lambda batch=batch, timestep=timestep: unet(
                    batch, timestep.to(self.device), encoder_hidden_states=text, return_dict=False
                )[0]
            )
            if guided:
                positive, negative = output.chunk(2)
                output = negative + guidance * (positive - negative)
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]


def _rows(
    owners: Sequence[int],
    prompts: Sequence[str],
    latents: Tensor | None,
    timesteps: Tensor | None,
) -> DiffusionSamples:
    pairs = {
        pair: index for index, pair in enumerate(dict.fromkeys(zip(owners, prompts, strict=True)))
    }
    return DiffusionSamples(
        [owner for owner, _ in pairs],
        [prompt for _, prompt in pairs],
        owners,
        [pairs[pair] for pair in zip(owners, prompts, strict=True)],
        latents,
        timesteps,
    )
