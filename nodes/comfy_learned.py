"""Learned embeddings in ComfyUI's tokenizers, which know ``embedding:NAME`` from models/embeddings:
those of concepts during a merge, and those of a merged LoRA in a node's CLIP output.

A CLIP itself never changes: a copy of it has copies of its tokenizers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ..iteris_core.hosts.learned import EmbeddingTriggers, Encoder, Parts, Placeholders, give
from .comfy_internals import comfy


class EmbeddingTokenizer:
    """A CLIP whose tokenizers have the embeddings of ``triggers`` active, one per concept;
    ``in_force`` are their names."""

    def __init__(self, clip: Any, triggers: Sequence[EmbeddingTriggers] = ()) -> None:
        encoders = _encoders(clip) if any(one.words for one in triggers) else []
        self._placeholders = Placeholders(triggers, encoders)
        names = self._placeholders.words.keys()
        self._clip = _knowing(clip, encoders, names) if names else clip
        self.in_force = self._placeholders.in_force

    def tokenize(self, owner: int, prompt: str) -> Any:
        """Tokens of a concept's prompt, as ComfyUI makes them for drawing."""
        said = self._placeholders(owner, prompt, lambda mark: f" embedding:{mark} ")
        same = said == prompt
        return self._clip.tokenize(prompt if same else said.replace("  embedding:", " embedding:"))


def with_embeddings(clip: Any, embeddings: Mapping[str, Parts]) -> tuple[Any, set[str]]:
    """A copy of ``clip`` in which ``embedding:NAME`` finds these embeddings before those in
    models/embeddings, and the names of those that one of its text encoders accepts."""
    encoders = _encoders(clip)
    known = {name for name, parts in embeddings.items() if give(encoders, name, parts)}
    return _knowing(clip, encoders, known), known


def _encoders(clip: Any) -> list[Encoder]:
    return [Encoder(t, t.embedding_size) for t in tokenizers(clip.tokenizer)]


def _knowing(clip: Any, encoders: Sequence[Encoder], names: Set[str]) -> Any:
    """A copy of ``clip`` whose tokenizers know the vectors of its ``encoders``."""
    own = copy.copy(clip)
    vectors = {id(encoder.tokenizer): encoder.vectors for encoder in encoders}
    own.tokenizer = _copied(clip.tokenizer, vectors, names)
    return own


def tokenizers(tokenizer: Any) -> list[Any]:
    """The tokenizers of a composite (SDXL, FLUX, …), or the single one."""
    if isinstance(tokenizer, comfy.sd1_clip.SDTokenizer):
        return [tokenizer]
    return [
        one for part in vars(tokenizer).values() if _is_tokenizer(part) for one in tokenizers(part)
    ]


def _is_tokenizer(value: Any) -> bool:
    return hasattr(value, "tokenize_with_weights")


def _copied(tokenizer: Any, vectors: Mapping[int, Mapping[str, Tensor]], names: Set[str]) -> Any:
    own = copy.copy(tokenizer)
    if id(tokenizer) not in vectors:
        for name, part in vars(tokenizer).items():
            if _is_tokenizer(part):
                setattr(own, name, _copied(part, vectors, names))
        return own
    look_up = tokenizer._try_get_embedding
    if own.embedding_directory is None:
        own.embedding_directory = []  # with None it does not search for the word
        look_up = own._try_get_embedding

    def find(text: str) -> tuple[Any, ...]:
        """For ``_try_get_embedding``: the vectors, in later versions the name, and the rest."""
        name, *rest = text.split()
        plain = name.rstrip(",")
        theirs = look_up(text)
        if plain not in names:
            return theirs
        # A text encoder without vectors ignores the embedding, as with a file.
        own_vectors = vectors[id(tokenizer)].get(plain, torch.zeros(0, tokenizer.embedding_size))
        return own_vectors, *theirs[1:-1], " ".join([name[len(plain) :], *rest]).strip()

    own._try_get_embedding = find
    return own
