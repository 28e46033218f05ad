"""A ComfyUI MODEL and CLIP as host. Only the files ``comfy_*.py`` know ComfyUI's internals.

MODEL and CLIP are not patched: the text encoders (:mod:`.comfy_text`) and the denoiser
(:mod:`.comfy_denoiser`) only run. :mod:`.comfy_lora` reads LoRA files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..iteris_core.activations.lockstep import Lockstep
from ..iteris_core.activations.memory import halved, usable, with_less, with_spare
from ..iteris_core.activations.rows import Row, Text, loads_of
from ..iteris_core.architectures import unet
from ..iteris_core.architectures.record import TEXT_WIRINGS
from ..iteris_core.architectures.sites import residual_streams
from ..iteris_core.calibration import Calibration
from ..iteris_core.calibration_prompts import whole_words
from ..iteris_core.concepts import Concept
from ..iteris_core.errors import IterisError
from ..iteris_core.hosts.learned import EmbeddingTriggers
from ..iteris_core.hosts.protocol import DENOISING, SAMPLES_AT_ONCE, SampleRequest, Stage
from ..iteris_core.hosts.rows import SamplePrompts, added_concepts
from ..iteris_core.lora import Lora
from ..iteris_core.lora_files import ReadOptions
from ..iteris_core.lora_files.experts import second_of
from .comfy_conds import References, kind, size
from .comfy_denoiser import Denoiser
from .comfy_digest import digest_of_base
from .comfy_internals import memory
from .comfy_lora import ComfySites
from .comfy_runtime import CurrentCard, ran_out
from .comfy_sampling import ComfySamples, DenoiserRows, Kept, comfy_samples, make_latents
from .comfy_text import Conditioning, TextEncoders
from .concept_specs import DENOISER

LOW = f"{second_of(DENOISER)}."
"""Site prefix of the model for low noise."""
BOUNDARY = 0.875
"""Share of noise at which the model for low noise takes over: Wan 2.2's own, for text to video."""

_log = logging.getLogger(__name__)
_MEASURED_ROWS = 2  # for which ComfyUI frees memory before a row is measured


class ComfyHost(AbstractContextManager["ComfyHost"]):
    """Use as a context manager; on exit, MODEL and CLIP are in the state that ComfyUI expects.

    ``rows`` is the most rows per forward while samples are made; it is halved whenever memory runs
    out. For models with two experts, ``low`` is the MODEL that takes over when the share of noise
    is below ``boundary``; its sites are ``unet_2.…``. ``references`` are the user's inputs besides
    the texts. ``distilled`` says whether the base runs without guidance and never sees the empty
    prompt (None: detect). ``clip`` may be None if nothing runs.
    """

    pictures = True

    def __init__(
        self,
        model: Any,
        clip: Any,
        rows: int = 32,
        *,
        low: Any = None,
        boundary: float = BOUNDARY,
        references: References | None = None,
        distilled: bool | None = None,
    ) -> None:
        if low is not None and low.model is model.model:
            raise IterisError(
                "model and model_low are the same model; connect the one for high noise and the "
                "one for low noise, each from its own loader."
            )
        self.model, self.clip, self.low, self.boundary = model, clip, low, boundary
        self.references = references or References()
        self._batch = min(rows, SAMPLES_AT_ONCE)
        self._encoders: TextEncoders | None = None if clip is None else TextEncoders(clip)
        models = [model] if low is None else [model, low]
        self._denoisers = [Denoiser(one, self.references) for one in models]
        if distilled is None:
            distilled = any(denoiser.distilled for denoiser in self._denoisers)
        self.distilled = distilled
        self._found = found = ComfySites(model, clip)
        self.base, self.weight, self.read_lora = found.base, found.weight, found.read_lora
        self._low = None if low is None else ComfySites(low, clip)
        self._lockstep = Lockstep({}, {})
        self._running: TextEncoders | Denoiser = self._denoisers[0]
        self._wanted: dict[TextEncoders | Denoiser, int] = {}
        self._card = CurrentCard()

    def __exit__(self, *_: object) -> None:
        with self._card, ExitStack() as stack:
            for part in (*self._denoisers, *([self._encoders] if self._encoders else [])):
                stack.callback(part.close)

    @property
    def _texts(self) -> TextEncoders:
        if self._encoders is None:
            raise IterisError(
                "No CLIP is connected, and prompts need one; connect it (a checkpoint without "
                "text encoders needs a Load CLIP node). Only methods that look at weights alone, "
                "such as average or ties, work without."
            )
        return self._encoders

    @property
    def interrupts(self) -> tuple[type[Exception], ...]:
        return (memory.InterruptProcessingException,)

    def sites(self) -> Mapping[str, nn.Module]:
        if self._low is None:
            return self._found.modules
        second = {
            LOW + site.removeprefix(f"{DENOISER}."): module
            for site, module in self._low.modules.items()
            if not _of_text(site)
        }
        return {**self._found.modules, **second}

    experts = DENOISER

    def read_low(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        """Read the file for low noise; its sites are named as for the other model."""
        if self._low is None:
            raise IterisError(
                f"{Path(path).name} is for the model for low noise, which is not connected; use "
                "IterIS Merge Experts, which takes both models."
            )
        return self._low.read_lora(path, options)

    def activate(
        self, triggers: Sequence[EmbeddingTriggers]
    ) -> AbstractContextManager[Sequence[Set[str]]]:
        return self._texts.activate(triggers)

    def samples(self, request: SampleRequest) -> ComfySamples:
        for denoiser in self._denoisers:
            denoiser.check()
        before = request.generator.get_state()
        share = 0.0 if self.distilled else request.calibration.empty_share

        def make(rows: int) -> ComfySamples:
            self._batch, self._lockstep = rows, request.lockstep
            request.generator.set_state(before)
            drawn = SamplePrompts.drawn(request, self._vocabulary, share)
            kept = self._latents(drawn, rows)
            return comfy_samples(kept, drawn, self._texts.tokenize)

        def complaint(said: str, tried: Sequence[int]) -> str:
            rows = "; ".join(f"{some} rows" if some > 1 else "one row" for some in tried)
            return (
                f"Out of memory while making samples ({said}). Tried: {rows} per forward. Lower "
                "image_size or frames (smaller samples), or free memory elsewhere. MODEL and CLIP "
                "are unchanged."
            )

        release, sizes = memory.soft_empty_cache, halved(min(self._batch, request.at_once))
        return with_less(sizes, make, complaint, release=release, ran_out=ran_out)[0]

    def _latents(self, drawn: SamplePrompts, rows: int) -> list[Kept]:
        """The latents of every denoiser, one concept's after another's."""
        request, owners, prompts = drawn.request, drawn.owners, drawn.prompts
        noise = request.calibration.latents == "noise"
        guidance = 1.0 if self.distilled else max(request.calibration.guidance, 1.0)

        def digest() -> str | None:
            """A hash of what samples depend on besides prompts and LoRAs; None if there is none."""
            if any("embedding:" in prompt for prompt in prompts):  # of a file that may change
                return None
            models = [one.model for one in self._denoisers]
            return digest_of_base(models, self.clip, self.references, self.boundary, self.distilled)

        tensors, keep = drawn.kept(prompts, digest)
        missing = [row for row, owner in enumerate(owners) if owner not in tensors]
        texts: dict[int, tuple[Conditioning, Conditioning]] = {}
        if missing and not noise:
            _log.info("IterIS: making latents of %d samples", len(missing))
            encoded = self._encode_under_own_lora(drawn, missing)
            texts = dict(zip(missing, encoded, strict=True))
            self._card.be(self.model.load_device)
        for concept in dict.fromkeys(owners[row] for row in missing):
            own = [row for row in missing if owners[row] == concept]

            def steps_done(done: int, steps: int, before: int = own[0]) -> None:
                request.tick(DENOISING, before * steps + done, len(owners) * steps)

            latents = make_latents(
                self._denoisers,
                self.boundary,
                request.calibration,
                owner=concept,
                count=len(own),
                texts=[texts[row] for row in own] if texts else [],
                guidance=guidance,
                lockstep=request.lockstep,
                rows=rows,
                generator=drawn.generators[concept],
                steps_done=steps_done,
            )
            named = {number: vars(kept) for number, kept in enumerate(latents)}
            keep(concept, {f"{i} {name}": t for i, of in named.items() for name, t in of.items()})
        parts = (_kept(tensors[concept]) for concept in dict.fromkeys(owners))
        return [Kept.joined(of) for of in zip(*parts, strict=True)]

    @property
    def _vocabulary(self) -> list[str]:
        return whole_words(self._texts.vocabulary())

    def added(self, concepts: Sequence[Concept], calibration: Calibration) -> Sequence[Concept]:
        return added_concepts(concepts, calibration, self._vocabulary)

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        modules = self.sites()
        encoders = self.clip.cond_stage_model
        streams = residual_streams(encoders, modules, TEXT_WIRINGS, sites)
        for number, denoiser in enumerate(self._denoisers):
            if self._sites_of(number, sites):
                network = denoiser.model.model.diffusion_model
                streams |= residual_streams(network, modules, unet.WIRINGS)
        return streams

    def stages(self, samples: ComfySamples, sites: Set[str]) -> Iterator[Stage]:
        tokens, each = samples.tokens, samples.effective_samples
        batches = self._texts.batches(tokens, self._found.names, sites)
        self._running = self._texts
        self._load_texts(self._wanted.get(self._texts, 0))
        for batch in batches.values():
            if batch.sites:
                name = f"text encoder {batch.name}"
                of_batch = batch.sites, batch.rows, batch.forward
                yield Stage(name, *of_batch, feeds_next=True, samples=each)
            else:
                batch.run_all(self._batch, self._lockstep)
        conditionings = [
            self._texts.assemble(tokens, batches, copy, self._lockstep)
            for copy in range(2)
            if all(batch.has(copy) for batch in batches.values())
        ]
        for number, noisy in enumerate(samples.noisy):
            if names := self._sites_of(number, sites):
                yield self._stage(number, names, noisy, conditionings, each)

    def _load_texts(self, wanted: int = 0) -> None:
        self._card.be(self.clip.patcher.load_device)
        self._texts.load(wanted)

    def _stage(
        self,
        number: int,
        names: Sequence[str],
        noisy: DenoiserRows,
        conditionings: Sequence[Mapping[Text, Conditioning]],
        samples: int,
    ) -> Stage:
        """The stage of a denoiser, of which each copy has its conditionings; loads the denoiser."""
        denoiser = self._running = self._denoisers[number]
        latents, wanted = noisy.latents, self._wanted.get(denoiser, 0)
        first = conditionings[0][noisy.rows[0].text]
        self._card.be(denoiser.model.load_device)
        denoiser.load(latents.shape, noisy.schedule, first, _MEASURED_ROWS, wanted)
        used = dict.fromkeys(row.text for row in noisy.rows)
        inputs = [
            {text: denoiser.inputs(copy[text], latents.shape) for text in used}
            for copy in conditionings
        ]

        def predict(rows: Sequence[Row], copies: Sequence[int]) -> Tensor:
            index = torch.as_tensor([row.latent for row in rows] * len(copies))
            of_rows = [inputs[copy][row.text] for copy in copies for row in rows]
            return denoiser.predict(latents[index], noisy.times[index], of_rows)

        def forward(rows: Sequence[Row], copies: int) -> None:
            predict(rows, range(copies))

        def final(rows: Sequence[Row], copy: int) -> Tensor:
            return predict(rows, [copy])

        kinds = {text: tuple(kind(copy[text]) for copy in inputs) for text in inputs[0]}
        steps = noisy.times.tolist() if denoiser.by_step else [None] * len(noisy.times)
        rows = [
            replace(row, key=(kinds[row.text], steps[row.latent]), length=size(inputs[0][row.text]))
            for row in noisy.rows
        ]
        return Stage(
            "denoiser" if self.low is None else f"denoiser for {('high', 'low')[number]} noise",
            names,
            rows,
            forward,
            spatial=True,
            samples=samples,
            final=final,
            gradients=denoiser.gradients,
        )

    def free_memory(self, wanted: int) -> int:
        wanted = with_spare(wanted)
        # Kept for methods that run their stages again.
        self._wanted[self._running] = wanted
        return usable(self._running.free_memory(wanted))

    def _sites_of(self, number: int, sites: Set[str]) -> list[str]:
        """The ``sites`` of one denoiser."""
        return [site for site in sites if not _of_text(site) and site.startswith(LOW) == number]

    def _encode_under_own_lora(
        self, drawn: SamplePrompts, samples: Sequence[int]
    ) -> list[tuple[Conditioning, Conditioning]]:
        """For each of these samples, its text and the empty text, both with its own LoRA active."""
        request = drawn.request
        owners = [drawn.owners[sample] for sample in samples]
        texts = [
            (owner, drawn.prompts[sample], loads_of([owner]))
            for owner, sample in zip(owners, samples, strict=True)
        ]
        empty = [(owner, "", loads_of([owner])) for owner in owners]
        distinct = dict.fromkeys((*texts, *sorted(set(empty), key=lambda text: text[0])))
        tokens = {text: self._texts.tokenize(*text[:2]) for text in distinct}
        sites = request.lockstep.changes.keys()
        batches = self._texts.batches(tokens, self._found.names, sites)
        self._load_texts()
        for batch in batches.values():
            batch.run_all(self._batch, self._lockstep, request.tick)
        encoded = self._texts.assemble(tokens, batches, 0, self._lockstep)
        return [(encoded[text], encoded[none]) for text, none in zip(texts, empty, strict=True)]


def _kept(tensors: Mapping[str, Tensor]) -> list[Kept]:
    """The latents of every denoiser, from their names in a store."""
    return [
        Kept(*(tensors[f"{number} {name}"] for name in ("latents", "picks", "schedule")))
        for number in range(len(tensors) // 3)
    ]


def _of_text(site: str) -> bool:
    return site.startswith("text_encoder")
