"""The text encoders of a CLIP, each run on all prompts in batches of its own.

A composite (SDXL, FLUX, …) encodes one prompt at a time. Every encoder therefore first runs all
token lists in one stage, grouped by length. They get no padding beyond their tokenizer's, because
encoders may attend to padding. Then the composite encodes as usual, and ``encode`` of its encoders
returns the stored outputs. Word weights, pooled outputs and masks stay ComfyUI's. A composite of
encoders of another kind (Lens) encodes each text as usual, and LoRAs on it cannot be merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..iteris_core.activations.lockstep import Lockstep
from ..iteris_core.activations.micro_batch import MicroBatch
from ..iteris_core.activations.rows import Loads, Row, Text, as_merged
from ..iteris_core.errors import IterisError
from ..iteris_core.hosts.learned import EmbeddingTriggers, Placeholders
from ..iteris_core.hosts.protocol import Tick
from ..iteris_core.passes.batches import chunks
from .comfy_internals import comfy, memory
from .comfy_learned import encoders_of, knowing, tokenizers
from .comfy_runtime import free_beside

Conditioning = tuple[Tensor, dict[str, Any]]
Loaded = tuple[int, Loads]
"""A text's concept, and what the text encoders load."""

_NOTHING: Loaded = -1, ()


class TextEncoders:
    """The text encoders of one CLIP; :meth:`close` restores it."""

    def __init__(self, clip: Any) -> None:
        groups = (clip.patcher.forced_hooks, getattr(clip, "apply_hooks_to_conds", None))
        hooks = [hook for group in groups if group is not None for hook in group.hooks]
        scheduled = bool(hooks) and getattr(clip, "use_clip_schedule", False)
        if scheduled or any(not hook.hook_keyframe.is_empty() for hook in hooks):
            raise IterisError(
                "The CLIP has a hook schedule, so its weights change between steps; connect the "
                "CLIP from before Set CLIP Hooks."
            )
        self._clip = clip
        self._reader, self._placeholders = clip, Placeholders((), ())
        self._encoders: dict[str, Any] = {
            name: module
            for name, module in clip.cond_stage_model.named_modules()
            if isinstance(module, comfy.sd1_clip.SDClipModel)
        }
        self._encoded: dict[Any, Conditioning] = {}  # by an encoder that no LoRA changes

    def close(self) -> None:
        for encoder in self._encoders.values():
            encoder.__dict__.pop("encode", None)

    @contextmanager
    def activate(self, triggers: Sequence[EmbeddingTriggers]) -> Iterator[Sequence[Set[str]]]:
        """Context in which the concepts' prompts have their embeddings active."""
        encoders = encoders_of(self._clip) if any(one.words for one in triggers) else []
        self._placeholders = Placeholders(triggers, encoders)
        if names := self._placeholders.words.keys():
            self._reader = knowing(self._clip, encoders, names)
        try:
            yield self._placeholders.in_force
        finally:
            self._reader, self._placeholders = self._clip, Placeholders((), ())

    def tokenize(self, concept: int, prompt: str) -> Any:
        """Tokens of a concept's prompt, as ComfyUI makes them for drawing; lengths differ if a
        tokenizer does not pad."""
        said = self._placeholders(concept, prompt, lambda mark: f" embedding:{mark} ")
        said = prompt if said == prompt else said.replace("  embedding:", " embedding:")
        # ACE-Step 1.5's language model would write codes, token by token, for every text.
        silent = hasattr(self._clip.cond_stage_model, "lm_model")
        return self._reader.tokenize(said, **({"generate_audio_codes": False} if silent else {}))

    def vocabulary(self) -> Sequence[str]:
        """The pieces of the first tokenizer's vocabulary; empty if it does not expose them."""
        tokenizer = next(iter(tokenizers(self._clip.tokenizer)), None)
        known = getattr(tokenizer, "inv_vocab", {})
        return [piece for piece in known.values() if isinstance(piece, str)]

    def batches(
        self, tokens: Mapping[Text, Any], names: Mapping[str, str], sites: Set[str]
    ) -> dict[str, TextBatch]:
        """Encoder → its distinct token lists, separated by what is loaded if it contains one of
        ``sites``; ``names`` maps weight keys to sites."""
        batches: dict[str, TextBatch] = {}
        for name, encoder in self._encoders.items():
            prefix = f"{name}."
            own = [s for key, s in names.items() if s in sites and key.startswith(prefix)]
            rows: dict[tuple[Loaded, tuple[int, ...]], list[Any]] = {}
            for (concept, _, loads), some in tokens.items():
                loaded = (concept, loads) if own else _NOTHING
                for key in some:
                    for section in _sections(encoder, some[key]) if _is_of(key, name) else ():
                        rows.setdefault((loaded, _key(section)), section)
            ordered = dict(sorted(rows.items(), key=lambda item: item[0][0][0]))
            batches[name] = TextBatch(name, encoder, own, ordered)
        return batches

    def load(self, wanted: int = 0) -> None:
        """Prepare as ``CLIP.encode_from_tokens`` does before encoding, with ``wanted`` bytes free
        beyond ComfyUI's usual reserve."""
        model = self._clip.cond_stage_model
        model.reset_clip_options()
        if self._clip.layer_idx is not None:
            model.set_clip_options({"layer": self._clip.layer_idx})
        self.free_memory(wanted)
        model.set_clip_options({"execution_device": self._clip.patcher.load_device})

    def free_memory(self, wanted: int) -> int:
        """Free bytes besides the text encoders, after ComfyUI has freed ``wanted``: it evicts other
        models first, then the encoders' own weights."""
        patcher = self._clip.patcher
        with torch.inference_mode():
            memory.load_models_gpu([patcher], memory_required=wanted)
        return free_beside(patcher)

    def assemble(
        self,
        tokens: Mapping[Text, Any],
        batches: Mapping[str, TextBatch],
        copy: int,
        lockstep: Lockstep,
    ) -> dict[Text, Conditioning]:
        """The conditioning of every text, from the stored outputs of the text encoders."""
        conditionings: dict[Text, Conditioning] = {}
        try:
            for text, some in tokens.items():
                concept, _, loads = text
                if text[:2] in self._encoded:
                    conditionings[text] = self._encoded[text[:2]]
                    continue
                for batch in batches.values():  # encoders return their stored outputs
                    answer = partial(batch.answer, copy, (concept, loads), lockstep)
                    batch.encoder.encode = answer
                cond, extra = self._clip.encode_from_tokens_scheduled(some, show_pbar=False)[0]
                conditionings[text] = cond, extra
                if not self._encoders:
                    self._encoded[text[:2]] = cond, extra
        finally:
            self.close()
        return conditionings


class TextBatch:
    """The distinct token lists of one text encoder, and its outputs for them; only ``rows`` of
    equal length may run together."""

    def __init__(
        self,
        name: str,
        encoder: Any,
        sites: Sequence[str],
        rows: Mapping[tuple[Loaded, tuple[int, ...]], list[Any]],
    ) -> None:
        self.name, self.encoder, self.sites = name, encoder, sites
        self._keys, self._tokens = list(rows), list(rows.values())
        self.rows = [
            Row(concept, number, loads=loads, key=len(section), length=len(section))
            for number, (((concept, loads), _), section) in enumerate(rows.items())
        ]
        self._found: list[dict[Any, Any]] = [{}, {}]

    def forward(self, rows: Sequence[Row], copies: int) -> None:
        sections = [self._tokens[row.number] for row in rows] * copies
        outputs = type(self.encoder).encode(self.encoder, sections)
        for copy in range(copies):
            for index, row in enumerate(rows):
                at = copy * len(rows) + index
                self._found[copy][self._keys[row.number]] = _slice(outputs, at)

    def run_all(self, size: int, lockstep: Lockstep, tick: Tick | None = None) -> None:
        """Run all rows with their own LoRAs, at most ``size`` at a time and of equal length. An
        encoder that no LoRA changes gives every concept the same output."""
        done = 0
        with torch.no_grad():
            for part in chunks(range(len(self.rows)), [row.key for row in self.rows], size):
                rows = [self.rows[row] for row in part]
                done += len(rows)
                if tick is not None:
                    tick("encoding prompts", done, len(self.rows))
                if self.sites:
                    lockstep.run(MicroBatch(partial(self.forward, rows, 1), rows))
                else:
                    self.forward(rows, 1)
        if not self.sites:
            self._found[1] = self._found[0]

    def has(self, copy: int) -> bool:
        return bool(self._found[copy]) or not self._keys

    def answer(self, copy: int, loaded: Loaded, lockstep: Lockstep, sections: list[Any]) -> Any:
        """The encoder's outputs for token lists of a text."""
        keys = [(loaded if self.sites else _NOTHING, _key(section)) for section in sections]
        outputs_of = self._found[copy]
        if all(key in outputs_of for key in keys):
            states, pooled, *extra = zip(*(outputs_of[key] for key in keys), strict=True)
            return (
                torch.cat(states),
                None if pooled[0] is None else torch.cat(pooled),
                *({key: torch.cat([e[key] for e in some]) for key in some[0]} for some in extra),
            )
        outputs: list[Any] = []  # for a composite that alters the tokens

        def run() -> None:
            outputs.append(self.encoder(sections))

        concept, loads = loaded
        row = Row(concept, 0, loads=as_merged(loads) if copy else loads)
        lockstep.run(MicroBatch(run, [row] * len(sections)))
        return outputs[0]


def _sections(encoder: Any, pairs: Sequence[Any]) -> list[list[Any]]:
    """The token lists that ``encode_token_weights`` passes to ``encode``."""
    sections = [[token for token, *_ in section] for section in pairs]
    if sections and any(weight != 1.0 for section in pairs for _, weight, *_ in section):
        length = max(len(section) for section in sections)
        make = getattr(encoder, "gen_empty_tokens", comfy.sd1_clip.gen_empty_tokens)
        sections.append(make(encoder.special_tokens, length))
    return sections


def _is_of(key: str, encoder: str) -> bool:
    """True if ``key`` of a composite's tokens is for the text encoder of this name: ``l`` for
    ``clip_l``, ``byt5`` for ``byt5_small``, others for their own."""
    return key in (encoder, encoder.removeprefix("clip_")) or encoder.startswith(f"{key}_")


def _key(section: Sequence[Any]) -> tuple[int, ...]:
    """A hashable key; tokens are numbers or, for embeddings, tensors."""
    return tuple(token if isinstance(token, int) else id(token) for token in section)


def _slice(outputs: Any, at: int) -> Any:
    """Row ``at`` of (states, pooled or None[, extras])."""
    where = memory.intermediate_device()
    states, pooled, *extra = outputs
    return (
        states[at : at + 1].to(where),
        None if pooled is None else pooled[at : at + 1].to(where),
        *({key: value[at : at + 1] for key, value in some.items()} for some in extra),
    )
