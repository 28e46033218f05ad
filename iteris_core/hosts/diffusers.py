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
from ..architectures import text
from ..architectures.record import Conditioning
from ..architectures.sites import in_changed_parts, residual_streams
from ..concepts import Calibration, Concept, concept_prompts
from ..lora import Lora
from ..lora_files import ReadOptions
from .diffusers_lora import COMPONENTS, base_of, calls_of, pipeline_sites, read_lora
from .diffusers_noise import NoiseSchedule
from .protocol import Stage, Tick, check_eval, check_model

_BATCH = 16  # rows per forward while samples are made
_GUIDANCE = 3.5  # what FLUX pipelines give a model that takes it as an input


@dataclass(frozen=True)
class DiffusionSamples:
    """Rows of the denoiser, sorted by concept.

    ``text_owners`` and ``text_prompts`` list the distinct (concept, prompt) pairs, and
    ``text_rows`` says which of them each row uses. ``latents`` is (rows, …), shaped as the model
    takes them, ``timesteps`` (rows,); both are None where no site needs the denoiser to run.
    ``guidance`` is what a guidance-distilled model is given.
    """

    text_owners: Sequence[int]
    text_prompts: Sequence[str]
    owners: Sequence[int]
    text_rows: Sequence[int]
    latents: Tensor | None
    timesteps: Tensor | None
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
        prompts = [concept_prompts(concept, calibration, generator) for concept in concepts]
        share = calibration.empty_share if self.calls.empty_prompts else 0.0
        if not self._needs_denoiser(sites) and share:
            prompts = [[*some, ""] for some in prompts]
        owners = [i for i, some in enumerate(prompts) for _ in some]
        flat = [prompt for some in prompts for prompt in some]
        guidance = calibration.guidance if calibration.guidance > 1 else _GUIDANCE
        if not self._needs_denoiser(sites):
            return _rows(owners, flat, None, None, guidance)

        latents, timesteps = self._latents(
            flat, owners, calibration, lockstep, generator, tick
        )  # (prompts, T, …) and (prompts, T)
        count = timesteps.shape[1]
        row_owners = [owner for owner in owners for _ in range(count)]
        row_prompts = [prompt for prompt in flat for _ in range(count)]
        empty = torch.rand(len(row_owners), generator=generator) < share
        for row in empty.nonzero().flatten().tolist():
            row_prompts[row] = ""
        return _rows(row_owners, row_prompts, latents.flatten(0, 1), timesteps.flatten(), guidance)

    def forward(self, samples: DiffusionSamples, rows: Sequence[int]) -> Tensor:
        text = self._encode([samples.text_prompts[samples.text_rows[row]] for row in rows])
        if samples.latents is None or samples.timesteps is None:
            return text["states"]
        index = torch.as_tensor(list(rows))
        return self._predict(
            samples.latents[index], samples.timesteps[index], text, samples.guidance
        )

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        streams: dict[str, nn.Module] = {}
        for component in sorted({site.partition(".")[0] for site in sites}):
            if component.startswith("text_encoder"):
                encoder = getattr(self.pipeline, component)
                known = residual_streams(encoder, self._sites, text.WIRINGS)
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
        texts = range(len(samples.text_prompts))
        self._encoded = [[{}] * len(texts) for _ in range(2)]
        if text_sites:
            owners, groups = samples.text_owners, [[row] for row in texts]
            run = partial(self._run_text, samples, groups)
        else:  # no LoRA changes the encoders: they give the same for every concept, and merged
            self._encoded[1] = self._encoded[0]
            prompts = dict.fromkeys(samples.text_prompts)
            groups = [[r for r in texts if samples.text_prompts[r] == p] for p in prompts]
            owners = [0] * len(groups)

            def run(rows: Sequence[int], copies: int) -> None:
                self._run_text(samples, groups, rows, 1)

        yield Stage("text encoder", text_sites, owners, run, feeds=bool(others))
        if self._needs_denoiser(sites):
            run = partial(self._run_denoiser, samples)
            yield Stage(self.architecture.denoiser, others, samples.owners, run, places=True)
        elif others:
            run = partial(self._run_projections, [self._sites[site] for site in others])
            yield Stage("cross-attention", others, samples.text_owners, run)
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

    def _run_text(
        self,
        samples: DiffusionSamples,
        groups: Sequence[Sequence[int]],
        rows: Sequence[int],
        copies: int,
    ) -> None:
        """Encode what the texts of ``groups[row]`` have in common, for every one of ``rows``."""
        prompts = [samples.text_prompts[groups[row][0]] for row in rows]
        text = self._encode(prompts * copies)
        for index in range(copies * len(rows)):
            copy, number = divmod(index, len(rows))
            part = {name: tensor[index].cpu() for name, tensor in text.items()}
            for place in groups[rows[number]]:
                self._encoded[copy][place] = part

    def _text_batch(self, rows: Sequence[int], copies: int) -> Conditioning:
        texts = [self._encoded[copy][row] for copy in range(copies) for row in rows]
        return {name: torch.stack([text[name] for text in texts]) for name in texts[0]}

    def _run_denoiser(self, samples: DiffusionSamples, rows: Sequence[int], copies: int) -> None:
        assert samples.latents is not None
        assert samples.timesteps is not None
        index = torch.as_tensor(list(rows) * copies)
        text = self._text_batch([samples.text_rows[row] for row in rows], copies)
        self._predict(samples.latents[index], samples.timesteps[index], text, samples.guidance)

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
        steps, wanted = calibration.denoising_steps, calibration.timesteps
        shape = self.calls.latent_shape(self.pipeline, calibration.latent_size)
        schedule = NoiseSchedule(
            self.pipeline.scheduler,
            steps,
            shape,
            self.denoiser.config.get("patch_size", 1),
            even_sigmas=self.calls.even_sigmas,
        )
        noise = torch.randn(len(prompts), *shape, generator=generator)
        picks = torch.stack(
            [torch.randperm(steps, generator=generator)[:wanted] for _ in prompts]
        ).sort(dim=1)[0]
        if calibration.latents == "noise":
            kept = noise[:, None].expand(-1, wanted, *(-1 for _ in shape))
            return kept, schedule.timesteps[picks]

        kept = torch.zeros(len(prompts), wanted, *shape)
        mine = lockstep.processes.mine(len(prompts))
        chunks = [mine[start : start + _BATCH] for start in range(0, len(mine), _BATCH)]
        tick("denoising samples", 0, len(chunks))
        for done, chunk in enumerate(chunks, 1):

            def keep(step: int, latents: Tensor, rows: Sequence[int] = chunk) -> None:
                index = torch.as_tensor(list(rows))
                row, slot = (picks[index] == step).nonzero(as_tuple=True)
                kept[index[row], slot] = latents[row.to(latents.device)].to("cpu", kept.dtype)

            predict = self._own_predict(
                [prompts[row] for row in chunk],
                [owners[row] for row in chunk],
                calibration.guidance,
                lockstep,
            )
            start = noise[list(chunk)].to(self.device, self.denoiser.dtype)
            schedule.denoise(start, predict, keep)
            tick("denoising samples", done, len(chunks))
        lockstep.processes.add_up([kept])
        return kept, schedule.timesteps[picks]

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


def _rows(
    owners: Sequence[int],
    prompts: Sequence[str],
    latents: Tensor | None,
    timesteps: Tensor | None,
    guidance: float,
) -> DiffusionSamples:
    pairs = list(zip(owners, prompts, strict=True))
    texts = {pair: index for index, pair in enumerate(dict.fromkeys(pairs))}
    text_owners, text_prompts = [owner for owner, _ in texts], [prompt for _, prompt in texts]
    rows = [texts[pair] for pair in pairs]
    return DiffusionSamples(text_owners, text_prompts, owners, rows, latents, timesteps, guidance)
