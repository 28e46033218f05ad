"""The words in a concept's prompts that name the embeddings of its LoRA file, and these embeddings
on a pipeline with transformers tokenizers.

There no weight is resized. In :func:`in_force` the pipeline uses copies of its tokenizers with one
extra token per vector, for which the forwards of the token embeddings return the vectors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..concepts import Concept
from .recorded import replaced_forward

Parts = Mapping[str, Tensor]
"""Text encoder (``clip_l``, …) → (vectors, width), as in :attr:`..lora.Lora.embeddings`."""


@dataclass(frozen=True)
class EmbeddingTriggers:
    """One concept's ``embeddings``, and the ``texts`` that may name them: as ``<name>``, as
    ``embedding:name`` or by the plain name. The plain name of ``<cat>`` or of ``cat`` beside
    ``<cat>`` is a common noun, and so is a word of the ``class_word``."""

    embeddings: Mapping[str, Parts] = field(default_factory=dict[str, Parts])
    texts: Sequence[str] = ()
    class_word: str = ""

    @cached_property
    def _cores(self) -> Mapping[str, str]:
        """The names without brackets, in lower case, longer ones first, each with its name."""
        cores = {name.strip("<> ").lower(): name for name in self.embeddings}
        return {core: cores[core] for core in sorted(cores, key=len, reverse=True) if core}

    def _named(self, word: str) -> str:
        return self._cores[word.lower().removeprefix("embedding:").strip("<>")]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """A name in any form, not inside another word or a path."""
        texts, common = "\n".join(self.texts).lower(), self.class_word.lower().split()
        plain = [
            core
            for core, name in self._cores.items()
            if core == name.lower() and f"<{core}>" not in texts and core not in common
        ]
        names = self._cores, plain
        every, alone = ("|".join(map(re.escape, some)) or r"(?!)" for some in names)
        return re.compile(
            rf"<(?:{every})>|(?<![\w/<-])(?:embedding:<?(?:{every})>?|{alone})(?![\w-]|\.\w)",
            re.IGNORECASE,
        )

    @cached_property
    def words(self) -> Mapping[str, str]:
        """The words in the texts that name an embedding, in lower case, and its name."""
        matches = (match[0] for text in self.texts for match in self._pattern.finditer(text))
        return {word.lower(): self._named(word) for word in matches}

    def replaced(self, prompt: str, say: Callable[[str], str]) -> str:
        """``prompt`` with every word that names an embedding replaced by ``say(word)``."""
        return self._pattern.sub(lambda match: say(match[0]), prompt)

    def renamed(self, phrase: str, names: Mapping[str, str]) -> str:
        """``phrase`` with the embeddings' new ``names``, as in a merged file."""
        others = self.replaced(phrase, lambda word: "").lower().split()

        def say(word: str) -> str:
            name = names[self._named(word)]
            return f"<{name}>" if name.lower() in others else name  # "<cat> cat"

        return self.replaced(phrase, say)

    def warnings(self, active: Set[str]) -> list[str]:
        """Warnings about inactive embeddings, without which a LoRA does not behave as trained."""
        warnings: list[str] = []
        for name in self.embeddings.keys() - active:
            widths = {part: vectors.shape[1] for part, vectors in self.embeddings[name].items()}
            why = f"no prompt names it. Write embedding:{name} in the trigger or the prompts"
            if name in self.words.values():
                why = (
                    f"no text encoder of the base takes {widths} (text encoder: width of the "
                    "vectors); the file is for another base model"
                )
            warnings.append(
                f"its embedding {name} is not active, so this concept is merged without what its "
                f"trigger has learned: {why}"
            )
        return sorted(warnings)


def embedding_triggers(concept: Concept) -> EmbeddingTriggers:
    """The embeddings of the concept's file, and its prompts, or phrases without any."""
    if concept.lora is None or not concept.lora.embeddings:
        return EmbeddingTriggers()
    texts = concept.phrases if concept.prompts is None else [*map(str, concept.prompts)]
    return EmbeddingTriggers(concept.lora.embeddings, texts, concept.class_word)


@dataclass
class Encoder:
    """A text encoder, with its ``tokenizer`` called ``name``, and the ``width`` of its token
    embeddings; ``vectors`` are those it received, by the word that stands for them."""

    tokenizer: Any
    width: int
    name: str = ""
    model: Any = None
    vectors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def give(encoders: Sequence[Encoder], word: str, parts: Parts) -> bool:
    """Give each part's vectors to the first encoder of their width that has none for ``word``;
    returns True if one takes them."""
    for vectors in parts.values():
        fitting = [e for e in encoders if e.width == vectors.shape[1] and word not in e.vectors]
        for encoder in fitting[:1]:
            encoder.vectors[word] = vectors
    return any(word in encoder.vectors for encoder in encoders)


def placeholder(number: int, start: str = "iterisword") -> str:
    """A word for a tokenizer, in lower-case letters, which prompt cleaning leaves alone."""
    return start + "".join(chr(ord("a") + number // 26**place % 26) for place in (2, 1, 0))


class Placeholders:
    """``placeholders(owner, prompt)`` is a concept's prompt for a tokenizer, with a mark in place
    of each word that names an embedding. Marks keep concepts apart that use the same name.

    ``encoders`` receive the vectors by mark; words for which no encoder takes vectors stay as they
    are. ``words`` maps marks to the other words; ``in_force`` lists the names of their embeddings
    by concept.
    """

    def __init__(self, triggers: Sequence[EmbeddingTriggers], encoders: Sequence[Encoder]) -> None:
        self._triggers = triggers
        self._marks: dict[tuple[int, str], str] = {}
        self.in_force: list[set[str]] = [set() for _ in triggers]
        words = [(owner, word) for owner, calls in enumerate(triggers) for word in calls.words]
        for number, (owner, word) in enumerate(words):
            name, mark = triggers[owner].words[word], placeholder(number)
            if give(encoders, mark, triggers[owner].embeddings[name]):
                self._marks[owner, word] = mark
                self.in_force[owner].add(name)
        self.words = {mark: word for (_, word), mark in self._marks.items()}

    def __call__(self, owner: int, prompt: str, spell: Callable[[str], str] = str) -> str:
        """``spell`` formats a mark."""
        if not self._marks or owner >= len(self._triggers):
            return prompt

        def say(word: str) -> str:
            mark = self._marks.get((owner, word.lower()))
            return word if mark is None else spell(mark)

        return self._triggers[owner].replaced(prompt, say)


@contextmanager
def in_force(pipeline: Any, triggers: Sequence[EmbeddingTriggers]) -> Generator[Placeholders]:
    """Activate the embeddings of ``triggers``, one per concept, on ``pipeline``.

    Two concepts may use the same name for different vectors. A text encoder for which an embedding
    has no vectors reads the word itself.
    """
    encoders: list[Encoder] = []
    for end in ("", "_2", "_3", "_4") if any(calls.words for calls in triggers) else ():
        tokenizer: Any = getattr(pipeline, f"tokenizer{end}", None)
        model: Any = getattr(pipeline, f"text_encoder{end}", None)
        if isinstance(model, nn.Module) and hasattr(tokenizer, "add_tokens"):
            width: int = model.get_input_embeddings().weight.shape[-1]  # pyright: ignore
            encoders.append(Encoder(tokenizer, width, f"tokenizer{end}", model))
    placeholders = Placeholders(triggers, encoders)
    with ExitStack() as stack:
        for encoder in encoders if placeholders.words else ():
            texts, tokens = dict(placeholders.words), list[str]()
            for mark, vectors in encoder.vectors.items():
                new = [placeholder(len(tokens) + i, "iterisvector") for i in range(len(vectors))]
                texts[mark] = "".join(new)
                tokens += new
            tokenizer = copy.deepcopy(encoder.tokenizer)
            if tokens:
                tokenizer.add_tokens(tokens)
                ids = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))
                answer = partial(_answering, ids, torch.cat([*encoder.vectors.values()]))
                first: Any = encoder.model.get_input_embeddings()
                for module in encoder.model.modules():  # others share its weight, as in T5
                    same = isinstance(module, nn.Embedding) and module.weight is first.weight
                    if module is first or same:
                        stack.enter_context(replaced_forward(module, answer))
            tokenizer.__class__ = _reading(type(tokenizer), texts)
            # Not setattr, which would write the new class into the pipeline's configuration.
            stack.callback(pipeline.__dict__.update, {encoder.name: encoder.tokenizer})
            pipeline.__dict__[encoder.name] = tokenizer
        yield placeholders


def _reading(kind: type, texts: Mapping[str, str]) -> type:
    """A subclass of a tokenizer class that reads the values of ``texts`` in place of its keys."""
    pattern = re.compile("|".join(sorted(texts, key=len, reverse=True)))

    def read(text: Any) -> Any:
        if isinstance(text, str):
            return pattern.sub(lambda match: texts[match[0]], text)
        return [read(part) for part in text] if isinstance(text, list | tuple) else text

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
        new = equal.any(dim=-1)
        output = forward(tokens.masked_fill(new, 0))
        if not bool(new.any()):
            return output
        output = output.clone()
        output[new] = vectors.to(output)[equal.long().argmax(dim=-1)[new]]
        return output

    return answered
