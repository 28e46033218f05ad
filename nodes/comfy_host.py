"""A ComfyUI MODEL and CLIP as host. Only the files ``comfy_*.py`` know ComfyUI's internals.

Nothing of MODEL and CLIP is patched: the text encoders (:mod:`.comfy_text`) and the denoiser
(:mod:`.comfy_denoiser`) only run. LoRA files are read by :mod:`.comfy_lora`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..iteris_core.activations.lockstep import Lockstep, MicroBatch
from ..iteris_core.activations.meter import usable
from ..iteris_core.architectures import text as text_wirings
from ..iteris_core.architectures import unet
from ..iteris_core.architectures.sites import in_changed_parts, residual_streams
from ..iteris_core.concepts import Calibration, Concept
from ..iteris_core.errors import IterisError
from ..iteris_core.hosts.learned import Calls
from ..iteris_core.hosts.protocol import Stage, Tick
from ..iteris_core.hosts.rows import NoisyRows, TextRows, drawn_prompts, noisy_rows
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions
from .comfy_denoiser import Denoiser, kind, size
from .comfy_lora import ComfySites
from .comfy_text import Conditioning, TextEncoders

_SAMPLING_ROWS = 16
_MEASURED_ROWS = 2  # that ComfyUI makes room for before a row is measured


@dataclass(frozen=True)
class ScheduledRows(NoisyRows):
    """Latents on ComfyUI's scale; times are sigmas of the ``schedule`` of a whole denoising."""

    schedule: Tensor


@dataclass(frozen=True)
class ComfySamples:
    """``tokens`` are those of every text; ``noisy`` is None where no site needs the denoiser."""

    text: TextRows
    tokens: Sequence[Any]
    noisy: ScheduledRows | None = None


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
        self._lockstep = Lockstep({}, {})
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

    def token_counts(
        self, prompts: Sequence[str], owners: Sequence[int] | None = None
    ) -> list[int]:
        return self._texts.token_counts(prompts, owners)

    def learned(self, prompt: str) -> Set[str]:
        return self._texts.learned(prompt)

    def teach(self, calls: Sequence[Calls]) -> AbstractContextManager[Sequence[Set[str]]]:
        return self._texts.teach(calls)

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
        denoises = _needs_denoiser(sites)
        share = 0.0 if self._denoiser.distilled else calibration.empty_share
        empty = bool(share) and not denoises
        owners, prompts = drawn_prompts(concepts, calibration, generator, empty)
        if not denoises:
            return self._tokenized(TextRows.of(owners, prompts))
        latents, sigmas, schedule = self._denoiser.latents(
            owners,
            lambda: self._texts_alone(owners, prompts, sites, tick),
            calibration,
            lockstep,
            self._batch,
            generator,
            tick,
        )
        text, noisy = noisy_rows(owners, prompts, latents, sigmas, share, generator)
        return self._tokenized(text, ScheduledRows(noisy.latents, noisy.times, schedule))

    def forward(self, samples: Any, rows: Sequence[int]) -> Tensor:
        raise IterisError(
            "ComfyUI loads weights in inference mode, which keeps no gradients, so a merge cannot "
            "be polished there; set polish_steps to 0."
        )

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        modules = self._found.modules
        encoders = residual_streams(self.clip.cond_stage_model, modules, text_wirings.WIRINGS)
        streams = in_changed_parts(encoders, sites)
        if _needs_denoiser(sites):
            denoiser = self.model.model.diffusion_model
            streams |= residual_streams(denoiser, modules, unet.WIRINGS)
        return streams

    def stages(self, samples: ComfySamples, sites: Set[str]) -> Iterator[Stage]:
        text, tokens, noisy = samples.text, samples.tokens, samples.noisy
        owners = text.text_owners
        batches = self._texts.batches(owners, tokens, self._found.names, sites)
        self._running = self._texts
        self._texts.load(self._wanted.get(self._texts, 0))
        for batch in batches.values():
            if batch.sites:
                name = f"text encoder {batch.name}"
                yield Stage(
                    name,
                    batch.sites,
                    batch.owners,
                    batch.run,
                    feeds=noisy is not None,
                    kinds=batch.lengths,
                    lengths=batch.lengths,
                )
            else:
                batch.run_all(self._batch)
        if noisy is None:
            return
        conditionings = [
            self._texts.assemble(owners, tokens, batches, copy, self._lockstep)
            for copy in range(2)
            if all(batch.has(copy) for batch in batches.values())
        ]
        latents = noisy.latents
        names = [site for site in sites if not site.startswith("text_encoder")]
        self._running = self._denoiser
        self._denoiser.load(
            latents.shape,
            noisy.schedule,
            conditionings[0],
            _MEASURED_ROWS,
            self._wanted.get(self._denoiser, 0),
        )
        inputs = [
            [self._denoiser.inputs(cond, latents.shape) for cond in copy] for copy in conditionings
        ]
        kinds = [tuple(map(kind, copies)) for copies in zip(*inputs, strict=True)]

        def run(rows: Sequence[int], copies: int) -> None:
            index = torch.as_tensor(list(rows) * copies)
            of_rows = [inputs[copy][text.text_rows[row]] for copy in range(copies) for row in rows]
            self._denoiser.predict(latents[index], noisy.times[index], of_rows)

        yield Stage(
            "denoiser",
            names,
            text.owners,
            run,
            places=True,
            kinds=[kinds[row] for row in text.text_rows],
            lengths=[size(inputs[0][row]) for row in text.text_rows],
        )

    def room(self, wanted: int) -> int:
        # Kept for the iterations of a method that runs its stages again.
        self._wanted[self._running] = wanted
        return usable(self._running.room(wanted))

    def _tokenized(self, text: TextRows, noisy: ScheduledRows | None = None) -> ComfySamples:
        return ComfySamples(text, self._texts.tokenize(text.text_owners, text.texts), noisy)

    def _texts_alone(
        self, owners: list[int], prompts: list[str], sites: Set[str], tick: Tick
    ) -> tuple[list[Conditioning], list[Conditioning]]:
        """The conditioning of every row with its own LoRA active, and each concept's empty one."""
        count = max(owners) + 1
        rows = TextRows.of([*owners, *range(count)], [*prompts, *[""] * count])
        pair_owners = rows.text_owners
        tokens = self._texts.tokenize(pair_owners, rows.texts)
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
