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

from ..iteris_core.hosts.learned import Encoder, Parts, give
from .comfy_internals import comfy


def with_embeddings(clip: Any, embeddings: Mapping[str, Parts]) -> Any:
    """A copy of ``clip`` in which ``embedding:NAME`` finds those of these embeddings that a text
    encoder of it accepts, before those in models/embeddings."""
    encoders = encoders_of(clip)
    return knowing(clip, encoders, {n for n, of in embeddings.items() if give(encoders, n, of)})


def encoders_of(clip: Any) -> list[Encoder]:
    return [Encoder(t, t.embedding_size) for t in tokenizers(clip.tokenizer)]


def knowing(clip: Any, encoders: Sequence[Encoder], names: Set[str]) -> Any:
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
