"""A ComfyUI MODEL and CLIP as host. Only the files ``comfy_*.py`` know ComfyUI's internals.

Nothing of MODEL and CLIP is patched: the text encoders (:mod:`.comfy_text`) and the denoiser
(:mod:`.comfy_denoiser`) only run. LoRA files are read by :mod:`.comfy_lora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..iteris_core.activations.lockstep import Lockstep, MicroBatch
from ..iteris_core.activations.meter import usable
from ..iteris_core.architectures import text, unet
from ..iteris_core.architectures.sites import in_changed_parts, residual_streams
from ..iteris_core.concepts import Calibration, Concept, concept_prompts
from ..iteris_core.errors import IterisError
from ..iteris_core.hosts.protocol import Stage, Tick
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions
from .comfy_denoiser import Denoiser, kind, size
from .comfy_lora import ComfySites
from .comfy_text import Conditioning, TextEncoders

_SAMPLING_ROWS = 16
_MEASURED_ROWS = 2  # that ComfyUI makes room for before a row is measured


@dataclass(frozen=True)
class ComfySamples:
    """Rows of the denoiser, sorted by concept, as in the diffusers host.

    ``text_owners`` and ``tokens`` list the distinct (concept, prompt) pairs; ``text_rows`` says
    which of them a row uses. ``latents`` are on ComfyUI's scale of ``sigmas``, which are from the
    ``schedule`` of a whole denoising; all are None where no site needs the denoiser to run.
    """

    text_owners: Sequence[int]
    tokens: Sequence[Any]
    owners: Sequence[int]
    text_rows: Sequence[int]
    latents: Tensor | None
    sigmas: Tensor | None
    schedule: Tensor | None


class ComfyHost:
    """Use as a context manager: leaving it gives MODEL and CLIP back as ComfyUI expects them.

    ``rows`` is how many rows a forward may have while samples are made.
    """

    pictures = True

    def __init__(self, model: Any, clip: Any, rows: int = 32) -> None:
        self.model, self.clip = model, clip
        self._batch = min(rows, _SAMPLING_ROWS)
        self._texts, self._denoiser = TextEncoders(clip), Denoiser(model)
        self._found = ComfySites(model, clip)
        self._lockstep: Lockstep | None = None
        self._running: TextEncoders | Denoiser = self._texts
        self._wanted: dict[TextEncoders | Denoiser, int] = {}

    def __enter__(self) -> ComfyHost:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._texts.close()
        finally:
            self._denoiser.close()

    def sites(self) -> Mapping[str, nn.Module]:
        return self._found.modules

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        return self._found.read_lora(path, options)

    def token_counts(self, prompts: Sequence[str]) -> list[int]:
        return self._texts.token_counts(prompts)

    def learned(self, prompt: str) -> Set[str]:
        return self._texts.learned(prompt)

    def samples(
        self,
        concepts: Sequence[Concept],
        sites: Set[str],
        calibration: Calibration,
        lockstep: Lockstep,
        generator: torch.Generator,
        tick: Tick,
    ) -> ComfySamples:
        self._lockstep = lockstep
        prompts = [concept_prompts(concept, calibration, generator) for concept in concepts]
        denoises = _needs_denoiser(sites)
        share = 0.0 if self._denoiser.distilled else calibration.empty_share
        if not denoises and share:
            prompts = [[*some, ""] for some in prompts]
        owners = [i for i, some in enumerate(prompts) for _ in some]
        flat = [prompt for some in prompts for prompt in some]
        if not denoises:
            return self._as_samples(owners, flat)

        latents, sigmas, schedule = self._denoiser.latents(
            owners,
            lambda: self._texts_alone(owners, flat, sites, tick),
            calibration,
            lockstep,
            self._batch,
            generator,
            tick,
        )
        count = sigmas.shape[1]
        row_owners = [owner for owner in owners for _ in range(count)]
        row_prompts = [prompt for prompt in flat for _ in range(count)]
        empty = torch.rand(len(row_owners), generator=generator) < share
        for row in empty.nonzero().flatten().tolist():
            row_prompts[row] = ""
        return self._as_samples(
            row_owners, row_prompts, latents.flatten(0, 1), sigmas.flatten(), schedule
        )

    def forward(self, samples: Any, rows: Sequence[int]) -> Tensor:
        raise IterisError(
            "ComfyUI loads weights in inference mode, which keeps no gradients, so a merge cannot "
            "be polished there; set polish_steps to 0."
        )

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        modules = self._found.modules
        encoders = residual_streams(self.clip.cond_stage_model, modules, text.WIRINGS)
        streams = in_changed_parts(encoders, sites)
        if _needs_denoiser(sites):
            denoiser = self.model.model.diffusion_model
            streams |= residual_streams(denoiser, modules, unet.WIRINGS)
        return streams

    def stages(self, samples: ComfySamples, sites: Set[str]) -> Iterator[Stage]:
        assert self._lockstep is not None
        owners, tokens = samples.text_owners, samples.tokens
        batches = self._texts.batches(owners, tokens, self._found.names, sites)
        self._running = self._texts
        self._texts.load(self._wanted.get(self._texts, 0))
        feeds = _needs_denoiser(sites)
        for batch in batches.values():
            if batch.sites:
                name = f"text encoder {batch.name}"
                yield Stage(
                    name,
                    batch.sites,
                    batch.owners,
                    batch.run,
                    feeds=feeds,
                    kinds=batch.lengths,
                    lengths=batch.lengths,
                )
            else:
                batch.run_all(self._batch)
        if not feeds:
            return
        conditionings = [
            self._texts.assemble(owners, tokens, batches, copy, self._lockstep)
            for copy in range(2)
            if all(batch.has(copy) for batch in batches.values())
        ]
        assert samples.latents is not None
        assert samples.sigmas is not None
        assert samples.schedule is not None
        latents, sigmas = samples.latents, samples.sigmas
        names = [site for site in sites if not site.startswith("text_encoder")]
        self._running = self._denoiser
        self._denoiser.load(
            latents.shape,
            samples.schedule,
            conditionings[0],
            _MEASURED_ROWS,
            self._wanted.get(self._denoiser, 0),
        )
        inputs = [
            [self._denoiser.inputs(text, latents.shape) for text in some] for some in conditionings
        ]
        kinds = [tuple(map(kind, copies)) for copies in zip(*inputs, strict=True)]

        def run(rows: Sequence[int], copies: int) -> None:
            index = torch.as_tensor(list(rows) * copies)
            some = [inputs[copy][samples.text_rows[row]] for copy in range(copies) for row in rows]
            self._denoiser.predict(latents[index], sigmas[index], some)

        yield Stage(
            "denoiser",
            names,
            samples.owners,
            run,
            places=True,
            kinds=[kinds[text] for text in samples.text_rows],
            lengths=[size(inputs[0][text]) for text in samples.text_rows],
        )

    def room(self, wanted: int) -> int:
        # Kept for the iterations of a method that runs its stages again.
        self._wanted[self._running] = wanted
        return usable(self._running.room(wanted))

    def _as_samples(
        self,
        owners: Sequence[int],
        prompts: Sequence[str],
        latents: Tensor | None = None,
        sigmas: Tensor | None = None,
        schedule: Tensor | None = None,
    ) -> ComfySamples:
        keys = list(zip(owners, prompts, strict=True))
        pairs = {pair: index for index, pair in enumerate(dict.fromkeys(keys))}
        return ComfySamples(
            [owner for owner, _ in pairs],
            self._texts.tokenize([prompt for _, prompt in pairs]),
            owners,
            [pairs[pair] for pair in keys],
            latents,
            sigmas,
            schedule,
        )

    def _texts_alone(
        self, owners: list[int], prompts: list[str], sites: Set[str], tick: Tick
    ) -> tuple[list[Conditioning], list[Conditioning]]:
        """The conditioning of every row with its own LoRA active, and each concept's empty one."""
        assert self._lockstep is not None
        count = max(owners) + 1
        rows = self._as_samples([*owners, *range(count)], [*prompts, *[""] * count])
        pair_owners, tokens = rows.text_owners, rows.tokens
        batches = self._texts.batches(pair_owners, tokens, self._found.names, sites)
        self._texts.load()
        for batch in batches.values():
            done = 0
            for some in batch.batches(self._batch):
                done += len(some)
                tick("encoding prompts", done, len(batch.owners))
                if batch.sites:
                    own = [batch.owners[row] for row in some]
                    run = MicroBatch(lambda b=batch, s=some: b.run(s, 1), own, 1)
                    self._lockstep.run(run)
                else:
                    batch.run(some, 1)
        pairs = self._texts.assemble(pair_owners, tokens, batches, 0, self._lockstep)
        found = [pairs[row] for row in rows.text_rows]
        return found[: len(owners)], found[len(owners) :]


def _needs_denoiser(sites: Set[str]) -> bool:
    return any(not site.startswith("text_encoder") for site in sites)
