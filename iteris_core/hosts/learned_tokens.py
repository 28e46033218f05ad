"""Activates learned embeddings on a pipeline with transformers tokenizers.

No weight is resized, and the pipeline's tokenizers and text encoders do not change. Within the
context the pipeline uses copies of its tokenizers with one extra token per vector, and the forwards
of the token embeddings return the vectors for those.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .learned import EmbeddingTriggers, Encoder, Placeholders, placeholder
from .recorded import replaced_forward

_TOKEN = "iterisvector"


@contextmanager
def in_force(pipeline: Any, triggers: Sequence[EmbeddingTriggers]) -> Generator[Placeholders]:
    """Activate the embeddings of ``triggers``, one per concept, on ``pipeline``.

    Two concepts may use the same name for different vectors. A text encoder for which an embedding
    has no vectors reads the word itself.
    """
    encoders = _encoders(pipeline)
    placeholders = Placeholders(triggers, encoders)
    with ExitStack() as stack:
        for encoder in encoders if placeholders.words else ():
            stack.enter_context(_taught(pipeline, encoder, placeholders.words))
        yield placeholders


@contextmanager
def _taught(pipeline: Any, encoder: Encoder, plain: Mapping[str, str]) -> Generator[None]:
    """Context: the pipeline has a tokenizer that knows the encoder's words, and the encoder their
    vectors; a word without vectors is read as in ``plain``."""
    tokenizer, name = copy.deepcopy(encoder.tokenizer), encoder.name
    said = dict(plain)
    tokens: list[str] = []
    for mark, vectors in encoder.vectors.items():
        new = [placeholder(len(tokens) + index, _TOKEN) for index in range(len(vectors))]
        said[mark] = "".join(new)
        tokens += new
    if tokens:
        tokenizer.add_tokens(tokens)
    ids: list[int] = tokenizer.convert_tokens_to_ids(tokens)
    tokenizer.__class__ = _reading(type(tokenizer), said)
    # Not setattr, which would write the new class into the pipeline's configuration.
    pipeline.__dict__[name] = tokenizer
    with ExitStack() as stack:
        stack.callback(pipeline.__dict__.update, {name: encoder.tokenizer})
        if tokens:
            answer = partial(_answering, torch.tensor(ids), torch.cat([*encoder.vectors.values()]))
            for module in _token_embeddings(encoder.model):
                stack.enter_context(replaced_forward(module, answer))
        yield


def _reading(kind: type, said: Mapping[str, str]) -> type:
    """A subclass of the tokenizer class ``kind`` that reads the values of ``said`` in place of its
    keys."""
    pattern = re.compile("|".join(sorted(said, key=len, reverse=True)))

    def read(text: Any) -> Any:
        if isinstance(text, str):
            return pattern.sub(lambda match: said[match[0]], text)
        return [read(one) for one in text] if isinstance(text, list | tuple) else text

    def reading(method: str) -> Any:
        def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
            return getattr(super(taught, self), method)(read(text), *args, **kwargs)

        return call

    names = ("__call__", "tokenize", "encode")
    known = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    taught = type(kind.__name__, (kind,), {**known, **{name: reading(name) for name in names}})
    return taught


def _answering(
    ids: Tensor, vectors: Tensor, forward: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The forward of a token embedding that returns ``vectors`` for ``ids`` beyond its rows."""

    def answered(tokens: Tensor) -> Tensor:
        equal = tokens[..., None] == ids.to(tokens.device)
        own = equal.any(dim=-1)
        output = forward(tokens.masked_fill(own, 0))
        if not bool(own.any()):
            return output
        output = output.clone()
        output[own] = vectors.to(output)[equal.long().argmax(dim=-1)[own]]
        return output

    return answered


def _encoders(pipeline: Any) -> list[Encoder]:
    """The text encoders of a pipeline whose tokenizers can learn words."""
    encoders: list[Encoder] = []
    clips = 0
    for end in ("", "_2", "_3", "_4"):
        tokenizer: Any = getattr(pipeline, f"tokenizer{end}", None)
        model: Any = getattr(pipeline, f"text_encoder{end}", None)
        if not isinstance(model, nn.Module) or not hasattr(tokenizer, "add_tokens"):
            continue
        kind = type(model).__name__
        parts: Set[str] = {"t5xxl", "umt5xxl"} if "T5" in kind else set()
        if kind.startswith("CLIP"):
            clips += 1
            # SDXL's refiner and Hunyuan Video have only the second one.
            parts = {"clip_g"} if clips == 2 else {"clip_l", "clip_h"}
            parts |= {"clip_g"} if end and clips == 1 else set()
        width: int = _token_embeddings(model)[0].weight.shape[-1]
        encoders.append(Encoder(tokenizer, parts, width, f"tokenizer{end}", model))
    return encoders


def _token_embeddings(model: Any) -> list[Any]:
    """The module that embeds a model's tokens, and others that share its weight, as in T5."""
    first = model.get_input_embeddings()
    shared = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        and module is not first
        and module.weight is first.weight
    ]
    return [first, *shared]
