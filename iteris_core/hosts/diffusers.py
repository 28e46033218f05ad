"""A diffusers pipeline as host.

Its own ``__call__`` makes the rows: it runs under each concept's LoRA, and the arguments of its
denoiser calls are recorded. Text encoders are a separate stage: the pipeline runs on each row's
prompt up to its denoiser, and the arguments that depend on the words then replace those in the row.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..activations.memory import free_memory, usable
from ..activations.rows import Row, Text
from ..architectures.record import TEXT_WIRINGS
from ..architectures.sites import residual_streams
from ..calibration import Calibration
from ..calibration_prompts import whole_words
from ..concepts import Concept
from ..errors import BaseError, SettingsError
from ..lora import Lora
from ..lora_files import ReadOptions
from .diffusers_arguments import Arguments, study
from .diffusers_loop import PipelineLoop
from .diffusers_lora import OF_TEXT, base_of, pipeline_sites, read_lora
from .diffusers_rows import DiffusionSamples, record_rows
from .learned import EmbeddingTriggers, Placeholders, in_force
from .protocol import Host, SampleRequest, Stage, check_ready
from .recorded import Call, entries, joined, kind, size
from .rows import SamplePrompts, added_concepts
from .sample_store import behaviour, digest, digest_of_weights
from .transformers import TransformersHost

Words = tuple[dict[Text, Call], dict[Text, Call]]
"""For each of two copies: text → the denoiser's arguments that depend on it."""


class DiffusersHost(Host):
    """Merges on a pipeline whose class loads LoRAs; ``call`` are extra arguments for it, such as
    the image for an editing or inpainting pipeline.

    The pipeline only runs: none of its weights, adapters or schedulers change. The text encoders
    are one stage and the denoiser another; two experts are a stage each. Raises
    :class:`IterisError` for a pipeline without a denoiser, or with a missing component.
    """

    pictures = True

    def __init__(self, pipeline: Any, **call: Any) -> None:
        self._sites = pipeline_sites(pipeline)
        self.architecture = base_of(pipeline, self._sites).architecture
        self.pipeline = pipeline
        for part in ("scheduler", "text_encoder", "tokenizer"):
            optional = getattr(type(pipeline), "_optional_components", ())
            if pipeline.components.get(part, part) is None and part not in optional:
                raise BaseError(
                    f"{type(pipeline).__name__} has no {part}. Load the whole pipeline."
                )
        self._loop = PipelineLoop(pipeline, self.architecture, call)
        components = sorted({site.partition(".")[0] for site in self._sites})
        self._models = [getattr(pipeline, component) for component in components]
        words = next((t for t in self._tokenizers if hasattr(t, "get_vocab")), None)
        self._vocabulary = [] if words is None else whole_words(words.get_vocab())
        self._placeholders: Placeholders | None = None
        self._studied: dict[Any, Arguments] = {}

    @property
    def denoiser(self) -> Any:
        return getattr(self.pipeline, self.architecture.denoiser)

    @property
    def experts(self) -> str:
        """The name of the first denoiser if there is a second one for low noise; else empty."""
        return self.architecture.denoiser if len(self._loop.denoisers) > 1 else ""

    def sites(self) -> Mapping[str, nn.Module]:
        return self._sites

    def read_lora(self, path: str | Path, options: ReadOptions | None = None) -> Lora:
        """The LoRA in the file or peft folder ``path``, float32, read as ``options`` say. Raises
        :class:`LoraFileError` for a file that does not fit the pipeline."""
        return read_lora(self.pipeline, self._sites, Path(path), options)

    @property
    def _tokenizers(self) -> list[Any]:
        """The pipeline's tokenizers, or the tokenizer of its processor."""
        parts = self.pipeline.components
        named = [part for name, part in parts.items() if "tokenizer" in name]
        tokenizers = [t for t in named if t is not None and not isinstance(t, nn.Module)]
        return tokenizers or [parts["processor"].tokenizer]

    def added(self, concepts: Sequence[Concept], calibration: Calibration) -> Sequence[Concept]:
        return added_concepts(concepts, calibration, self._vocabulary)

    @contextmanager
    def activate(self, triggers: Sequence[EmbeddingTriggers]) -> Generator[Sequence[Set[str]]]:
        try:
            with in_force(self.pipeline, triggers) as self._placeholders:
                yield self._placeholders.in_force
        finally:
            self._placeholders = None
            self._studied.clear()  # the pipeline may change after a merge
            self._loop.free()

    def _said(self, concept: int, prompt: str) -> str:
        """A concept's prompt as passed to the pipeline."""
        return prompt if self._placeholders is None else self._placeholders(concept, prompt)

    def samples(self, request: SampleRequest) -> DiffusionSamples:
        calibration = request.calibration
        for model in self._models:
            check_ready(model)
        read = calibration.denoising_steps, calibration.latent_size, calibration.frames
        key = (*read, getattr(self.pipeline, "scheduler", None))
        if key not in self._studied:
            self._studied[key] = study(self._loop, calibration)
        arguments = self._studied[key]
        share = calibration.empty_share if self._loop.empty_prompts else 0.0
        drawn = SamplePrompts.drawn(request, self._vocabulary, share)
        prompts = list(map(self._said, drawn.owners, drawn.prompts))
        base = partial(self._base_digest, arguments)
        samples = record_rows(self._loop, arguments, drawn, prompts, base)
        rows = [replace(row, prompt=self._said(row.concept, row.prompt)) for row in samples.rows]
        return replace(samples, rows=rows)

    def _base_digest(self, arguments: Arguments) -> str | None:
        """A hash of all that samples depend on beside prompts and LoRAs; None if there is none: for
        an argument of another kind, weights that are not there, or code of others on a model."""
        parts = {name: getattr(self.pipeline, name) for name in self.pipeline.components}
        models = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        weights = digest_of_weights(
            (
                (f"{name}.{path}", tensor)
                for name, part in models.items()
                for path, tensor in (*part.named_parameters(), *part.named_buffers())
            ),
            models,
        )
        scheduler = parts.get("scheduler")
        configured = type(scheduler).__name__, dict(getattr(scheduler, "config", {}))
        device = torch.device(self.pipeline._execution_device).type
        named = type(self.pipeline).__name__, version("diffusers"), device
        with suppress(TypeError):
            told = named, configured, arguments.size, self._loop.call, behaviour(models)
            return weights and digest([weights, *told])
        return None

    def streams(self, sites: Set[str]) -> Mapping[str, nn.Module]:
        streams: dict[str, nn.Module] = {}
        for component in sorted({site.partition(".")[0] for site in sites}):
            if component.startswith(OF_TEXT):
                encoder = getattr(self.pipeline, component)
                streams |= residual_streams(encoder, self._sites, TEXT_WIRINGS, sites)
            else:
                denoiser = getattr(self.pipeline, component)
                streams |= residual_streams(denoiser, self._sites, self.architecture.wirings)
        return streams

    def stages(self, samples: DiffusionSamples, sites: Set[str]) -> Iterator[Stage]:
        text_sites = [site for site in sites if site.startswith(OF_TEXT)]
        others = [site for site in sites if not site.startswith(OF_TEXT)]
        if not sites:
            return
        words: Words = {}, {}
        yield self._text_stage(text_sites, samples, words, feeds=bool(others))
        for number, name in enumerate(self._loop.denoisers):
            reached = [site for site in others if site.startswith(f"{name}.")]
            ran = (samples.ran == number).tolist()
            rows = [row for row in samples.rows if ran[row.latent]]
            if reached and rows:
                yield self._denoiser_stage(name, reached, samples, rows, words)

    def _text_stage(
        self, sites: Sequence[str], samples: DiffusionSamples, words: Words, *, feeds: bool
    ) -> Stage:
        """Without ``sites``, encoders give the same output for all concepts and the merge."""
        arguments = samples.arguments
        alike: dict[Text, list[Text]] = {}
        for text in dict.fromkeys(row.text for row in samples.rows):
            alike.setdefault(text if sites else (0, text[1], ()), []).append(text)
        rows = [
            Row(concept, number, prompt, loads=loads, text_loads=loads)
            for number, (concept, prompt, loads) in enumerate(alike)
        ]
        if not arguments.fixed_shapes:
            lengths = self._lengths([row.prompt for row in rows])
            rows = [replace(row, key=key) for row, key in zip(rows, lengths, strict=True)]

        def forward(rows: Sequence[Row], copies: int) -> None:
            prompts = [row.prompt for row in rows] * (copies if sites else 1)
            for index, call in enumerate(self._first(arguments, prompts, "cpu")):
                copy, at = divmod(index, len(rows))
                for text in alike[rows[at].text]:
                    for of_copy in words[copy : copy + 1] if sites else words:
                        of_copy[text] = call

        each = samples.effective_samples
        return Stage("text encoder", sites, rows, forward, feeds_next=feeds, samples=each)

    def _denoiser_stage(
        self,
        name: str,
        sites: Sequence[str],
        samples: DiffusionSamples,
        rows: Sequence[Row],
        words: Words,
    ) -> Stage:
        arguments = samples.arguments

        def call_of(row: Row, copy: int) -> Call:
            return {**words[copy].get(row.text, {}), **samples.call(row)}

        def forward(rows: Sequence[Row], copies: int) -> None:
            calls = [call_of(row, copy) for copy in range(copies) for row in rows]
            self._denoise(name, arguments, calls)

        def final(rows: Sequence[Row], copy: int) -> Tensor:
            return self._denoise(name, arguments, [call_of(row, copy) for row in rows])

        if not arguments.fixed_shapes or arguments.has_masks:
            # A preview only inspects the stages; the words are not encoded yet.
            lengths = self._lengths([row.prompt for row in rows])
            calls = [call_of(row, 0) for row in rows]
            rows = [
                replace(
                    row,
                    key=(length, kind(call, arguments.batched)),
                    length=0 if arguments.fixed_shapes else size(call),
                )
                for row, length, call in zip(rows, lengths, calls, strict=True)
            ]
        each = samples.effective_samples
        return Stage(name, sites, rows, forward, spatial=True, samples=each, final=final)

    def _lengths(self, prompts: Sequence[str]) -> list[tuple[int, ...]]:
        """The number of tokens of each prompt, for every tokenizer."""
        counts = [map(len, part(text=list(prompts)).input_ids) for part in self._tokenizers]
        return list(zip(*counts, strict=True))

    def free_memory(self, wanted: int) -> int:
        return usable(free_memory(torch.device(self.pipeline._execution_device)))

    def _denoise(self, name: str, arguments: Arguments, calls: Sequence[Call]) -> Tensor:
        call = joined(calls, arguments.batched, arguments.lists, self.pipeline._execution_device)
        return self._loop.denoise(name, call)

    def _first(
        self, arguments: Arguments, prompts: Sequence[str], device: str | None = None
    ) -> list[Call]:
        """For each prompt, the denoiser's arguments that stay the same in all steps, on the
        ``device`` (None: where they are)."""
        rows: list[Call] = []
        for batch in [prompts] if arguments.accepts_batch else [[prompt] for prompt in prompts]:
            call = self._loop.first_call(batch, arguments.size)
            moving = arguments.noise_args | arguments.step_args
            still = {path: value for path, value in call.items() if path not in moving}
            still = tree_map_only(Tensor, lambda tensor: tensor.to(device), still)
            rows += [entries(still, arguments.batched, row) for row in range(len(batch))]
        if self.pipeline.config.get("force_zeros_for_empty_prompt"):  # so does its guidance
            for prompt, row in zip(prompts, rows, strict=True):
                row |= {p: torch.zeros_like(row[p]) for p in arguments.prompt_args if not prompt}
        return rows


def host_of(model: Any) -> Host:
    """A host unchanged, or a new host with defaults for a pipeline or model. Raises
    :class:`SettingsError` for anything else."""
    if callable(getattr(model, "stages", None)):
        return model
    if isinstance(getattr(model, "components", None), Mapping):
        return DiffusersHost(model)
    if isinstance(model, nn.Module) and hasattr(model, "config"):
        return TransformersHost(model)
    raise SettingsError(
        f"{type(model).__name__} does not run a base model; pass a diffusers pipeline, a "
        "transformers model, or a host for one."
    )
