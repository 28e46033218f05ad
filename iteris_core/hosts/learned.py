"""The words in a concept's prompts that refer to the embeddings of its LoRA file, and these
embeddings on a pipeline with transformers tokenizers.

There no weight is resized. In :func:`in_force` the pipeline uses copies of its tokenizers with one
extra token per vector, for which the forwards of the token embeddings return the vectors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..concepts import Concept
from ..lora_files.embeddings import ANY
from .recorded import replaced_forward

Parts = Mapping[str, Tensor]
"""Text encoder (``clip_l``, …) → (vectors, width), as in :attr:`..lora.Lora.embeddings`."""


@dataclass(frozen=True)
class EmbeddingTriggers:
    """The triggers of one concept: ``words``, in lower case, each with the name of the embedding to
    which it refers; these ``embeddings``; and those that are ``uncalled``, because no prompt names
    them."""

    words: Mapping[str, str] = field(default_factory=dict[str, str])
    embeddings: Mapping[str, Parts] = field(default_factory=dict[str, Parts])
    uncalled: Sequence[str] = ()

    def replaced(self, prompt: str, say: Callable[[str], str]) -> str:
        """``prompt`` with every word that refers to an embedding replaced by ``say(word)``."""
        return _any_of(self.words).sub(lambda m: say(m[0]), prompt) if self.words else prompt

    def renamed(self, phrase: str, names: Mapping[str, str]) -> str:
        """``phrase`` with the embeddings' new ``names``, as in a merged file."""
        others = self.replaced(phrase, lambda word: "")

        def say(word: str) -> str:
            name = names[self.words[word.lower()]]
            return f"<{name}>" if _said([name.lower()], [others]) else name  # "<cat> cat"

        return self.replaced(phrase, say)

    def notes(self, in_force: Set[str]) -> list[str]:
        """Notes for the report; the host activated the embeddings ``in_force``."""
        said = {n: [repr(w) for w, called in self.words.items() if called == n] for n in in_force}
        return [f"{' or '.join(said[n])} calls for its embedding {n}" for n in in_force]

    def warnings(self, in_force: Set[str]) -> list[str]:
        """Warnings about inactive embeddings, without which a LoRA does not behave as trained."""
        odd = [name for name in self.embeddings if name not in in_force]
        widths = {part: v.shape[1] for name in odd for part, v in self.embeddings[name].items()}
        why = (
            f"no text encoder of the base takes {widths} (text encoder: width of the vectors); the "
            "file is for another base model"
        )
        how = " or ".join(repr(word) for name in self.uncalled[:1] for word in _spellings(name)[:2])
        unsaid = f"no prompt names it. Say its name in the trigger or the prompts, such as {how}"
        return [
            f"its embedding {', '.join(names)} is not active, so this concept is merged without "
            f"what its trigger has learned: {because}"
            for names, because in ((odd, why), (self.uncalled, unsaid))
            if names
        ]


def embedding_triggers(concept: Concept) -> EmbeddingTriggers:
    """How prompts of ``concept`` refer to its file's embeddings: by name, as ``<name>``, or as
    ``embedding:name``. A single embedding is also called by the tokens of pivotal tuning for its
    vectors, ``<s0><s1>…``."""
    brought = concept.lora.embeddings if concept.lora is not None else {}
    texts = list(concept.phrases if concept.prompts is None else concept.prompts)
    words: dict[str, str] = {}
    for name, parts in brought.items():
        forms = _spellings(name)
        if len(brought) == 1:
            tokens = [f"<s{i}>" for i in range(max(map(len, parts.values())))]
            forms += ["".join(tokens), " ".join(tokens)]
        said = _said(forms, texts)
        core = name.strip("<>").lower()
        if core in said and (len(said) > 1 or core in concept.class_word.lower().split()):
            said.remove(core)  # "<cat> cat": a common noun, which no file owns
        words |= dict.fromkeys(said, name)
    called = {name: parts for name, parts in brought.items() if name in words.values()}
    return EmbeddingTriggers(words, called, [name for name in brought if name not in called])


@dataclass
class Encoder:
    """A text encoder, with its ``tokenizer`` called ``name``. Its vectors in an embedding are found
    by the names in ``parts``, or by its ``width``; ``vectors`` are those it received, by the word
    that stands for them."""

    tokenizer: Any
    parts: Set[str]
    width: int
    name: str = ""
    model: Any = None
    vectors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def give(encoders: Sequence[Encoder], word: str, parts: Parts) -> bool:
    """Give vectors to encoders that match by name, otherwise by width; returns True if one does."""
    for part, vectors in parts.items():
        named = [encoder for encoder in encoders if part in encoder.parts]
        anywhere = encoders if part == ANY or len(parts) == 1 else []
        fitting = [e for e in named or anywhere if e.width == vectors.shape[1]]
        for encoder in fitting[:1]:
            encoder.vectors.setdefault(word, vectors)
    return any(word in encoder.vectors for encoder in encoders)


def placeholder(number: int, start: str = "iterisword") -> str:
    """A word for a tokenizer, in lower-case letters, which prompt cleaning leaves alone."""
    return start + "".join(chr(ord("a") + number // 26**place % 26) for place in (2, 1, 0))


class Placeholders:
    """``placeholders(owner, prompt)`` is a concept's prompt for a tokenizer, with a mark in place
    of each word that refers to an embedding. Marks keep concepts apart that use the same name.

    ``encoders`` receive the vectors by mark; words for which no encoder takes vectors stay as they
    are. ``words`` maps marks to the other words; ``in_force`` lists the names of their embeddings
    by concept.
    """

    def __init__(self, triggers: Sequence[EmbeddingTriggers], encoders: Sequence[Encoder]) -> None:
        self._triggers = triggers
        self._marks: dict[tuple[int, str], str] = {}
        self.in_force: list[set[str]] = [set() for _ in triggers]
        words = [(owner, word) for owner, one in enumerate(triggers) for word in one.words]
        for number, (owner, word) in enumerate(words):
            name, mark = triggers[owner].words[word], placeholder(number)
            if give(encoders, mark, triggers[owner].embeddings[name]):
                self._marks[owner, word] = mark
                self.in_force[owner].add(name)
        self.words = {mark: word for (_, word), mark in self._marks.items()}

    def __call__(self, owner: int, prompt: str, spell: Callable[[str], str] = str) -> str:
        """``spell`` formats a mark."""
        if owner >= len(self._triggers):
            return prompt

        def say(word: str) -> str:
            mark = self._marks.get((owner, word.lower()))
            return word if mark is None else spell(mark)

        return self._triggers[owner].replaced(prompt, say)


def _spellings(name: str) -> list[str]:
    """The words that refer to an embedding of that name, in lower case."""
    core = name.strip("<>").lower()
    words = [name.lower(), f"<{core}>", core, f"embedding:{name.lower()}", f"embedding:{core}"]
    # A name such as "<>" leaves an empty word, which would match everywhere.
    return [word for word in dict.fromkeys(words) if word.removeprefix("embedding:").strip()]


def _said(words: Iterable[str], texts: Sequence[str]) -> list[str]:
    """The ``words`` that occur in the texts; if one is part of another, the longer one wins."""
    pattern = _any_of(words)
    return list(dict.fromkeys(m[0].lower() for text in texts for m in pattern.finditer(text)))


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of ``words``, not inside another word or a path; longer ones first."""
    patterns: list[str] = []
    for word in sorted(words, key=len, reverse=True):
        before = r"(?<![\w/<-])(?<!embedding:)" if re.match(r"[\w-]", word) else ""
        after = r"(?![\w-]|\.\w)" if re.search(r"[\w-]$", word) else ""
        patterns.append(f"{before}{re.escape(word)}{after}")
    return re.compile("|".join(patterns), re.IGNORECASE)


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
    """A subclass of a tokenizer class that reads the values of ``said`` in place of its keys."""
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
    others = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not first]
    return [first, *(module for module in others if module.weight is first.weight)]
