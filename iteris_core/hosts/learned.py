"""The words in a concept's prompts that refer to the embeddings of its LoRA file."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..concepts import Concept
from ..lora_files.embeddings import ANY

Parts = Mapping[str, Tensor]
"""Text encoder (``clip_l``, …) → (vectors, width), as in :attr:`..lora.Lora.embeddings`."""


@dataclass(frozen=True)
class EmbeddingRef:
    """``name`` is the embedding to which a word refers; ``vector`` selects one of its vectors
    (None: all)."""

    name: str
    vector: int | None = None

    def of(self, vectors: Tensor) -> Tensor:
        """The part of ``vectors`` to which the word refers."""
        return vectors if self.vector is None else vectors[self.vector : self.vector + 1]


@dataclass(frozen=True)
class EmbeddingTriggers:
    """The triggers of one concept. ``embeddings`` are those to which its words refer; ``words`` are
    in lower case.

    ``loaded`` are embeddings that the user already loaded into the text encoders; they stay as they
    are. ``uncalled`` are those that no prompt uses. ``by_trigger`` is the trigger, if it stands for
    the only embedding because no prompt names that.
    """

    words: Mapping[str, EmbeddingRef] = field(default_factory=dict[str, EmbeddingRef])
    embeddings: Mapping[str, Parts] = field(default_factory=dict[str, Parts])
    loaded: Sequence[str] = field(default_factory=list[str])
    uncalled: Sequence[str] = field(default_factory=list[str])
    by_trigger: str = ""

    def replaced(self, prompt: str, say: Callable[[str, EmbeddingRef], str]) -> str:
        """``prompt`` with every word that refers to an embedding replaced by ``say(word,
        call)``."""
        if not self.words:
            return prompt
        return _any_of(self.words).sub(lambda m: say(m[0], self.words[m[0].lower()]), prompt)

    def renamed(self, phrase: str, names: Mapping[str, str]) -> str:
        """``phrase`` with the embeddings' new ``names``, as in a merged file."""
        others = self.replaced(phrase, lambda word, call: "")

        def say(word: str, call: EmbeddingRef) -> str:
            name = names[call.name]
            if call.vector is not None:
                return word
            return f"<{name}>" if _said([name.lower()], [others]) else name  # "<cat> cat"

        return self.replaced(phrase, say)

    def notes(self, in_force: Set[str]) -> list[str]:
        """Notes for the report; the host activated the embeddings ``in_force``."""
        notes: list[str] = []
        for name in in_force:
            words = [word for word, call in self.words.items() if call.name == name]
            said = " or ".join(map(repr, words))
            why = ", which its prompts never name" if self.by_trigger else ""
            notes.append(f"{said} calls for its embedding {name}{why}")
        return [*notes, *(f"its embedding {name} is in the base already" for name in self.loaded)]

    def warnings(self, in_force: Set[str]) -> list[str]:
        """Warnings about inactive embeddings: without its embedding a LoRA does not behave as
        trained, and its features are wrong."""
        warnings: list[str] = []
        odd = [name for name in self.embeddings if name not in in_force]
        if odd:
            widths = {part: v.shape[1] for name in odd for part, v in self.embeddings[name].items()}
            warnings.append(
                f"its embedding {', '.join(odd)} is NOT IN FORCE, so this concept is merged "
                f"without what its trigger has learned: no text encoder of the base takes {widths} "
                "(text encoder: width of the vectors); the file is for another base model"
            )
        if self.uncalled:
            names = ", ".join(self.uncalled)
            warnings.append(
                f"its embedding {names} is NOT IN FORCE, so this concept is merged without what "
                "its trigger has learned: no prompt calls for it. Say its name in the trigger or "
                f"the prompts, such as {' or '.join(map(repr, _spellings(self.uncalled[0])[:2]))}"
            )
        return warnings


def embedding_triggers(
    concept: Concept, learned: Callable[[str], Set[str]] = lambda _: set()
) -> EmbeddingTriggers:
    """How prompts of ``concept`` refer to its file's embeddings: by name, as ``<name>`` or as
    ``embedding:name``. The tokens ``<s0><s1>…`` of pivotal tuning refer to the vectors of a single
    embedding. If no prompt names a single embedding, the trigger stands for it.

    ``learned`` comes from the host: embeddings in a prompt that the text encoders already know.
    """
    brought = concept.lora.embeddings if concept.lora is not None else {}
    if not brought:
        return EmbeddingTriggers()
    texts = list(concept.phrases if concept.prompts is None else concept.prompts)
    known = {name for text in texts for name in learned(text)}
    # A class word is a common noun; a file of the same name does not own it.
    kind = {word.lower() for word in concept.class_word.split()}
    words: dict[str, EmbeddingRef] = {}
    loaded: list[str] = []
    uncalled: list[str] = []
    for name, parts in brought.items():
        count = max(len(vectors) for vectors in parts.values()) if len(brought) == 1 else 0
        forms = {word: EmbeddingRef(name) for word in _spellings(name) if word not in kind}
        if count:
            forms |= {
                join.join(f"<s{i}>" for i in range(count)): EmbeddingRef(name) for join in ("", " ")
            }
        forms |= {f"<s{i}>": EmbeddingRef(name, i) for i in range(count) if count > 1}
        spelled = _said(forms, texts)
        said = {word: forms[word] for word in spelled}
        core = name.strip("<>").lower()
        if core in said and len(said) > 1:  # "<cat> cat"
            del said[core]
        by_hand = [word for word in said if learned(spelled[word])]
        if by_hand or (not said and len(known) >= len(brought)):
            loaded.append(name)
        elif said:
            words |= said
        else:
            uncalled.append(name)
    trigger = concept.trigger.strip().lower()
    trigger = "" if trigger.startswith("embedding:") else trigger  # names another embedding
    taken = len(brought) == 1 == len(uncalled) and trigger and _said([trigger], texts)
    if taken and not known:
        return EmbeddingTriggers({trigger: EmbeddingRef(uncalled[0])}, brought, by_trigger=trigger)
    called = {call.name for call in words.values()}
    used = {name: parts for name, parts in brought.items() if name in called}
    return EmbeddingTriggers(words, used, loaded, uncalled)


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
    """Give an embedding's vectors to the text encoders that match by name, otherwise by width.
    Returns True if one does."""
    for part, vectors in parts.items():
        named = [encoder for encoder in encoders if part in encoder.parts]
        anywhere = encoders if part == ANY or len(parts) == 1 else []
        fitting = [e for e in named or anywhere if e.width == vectors.shape[1]]
        for encoder in fitting[:1]:
            encoder.vectors.setdefault(word, vectors)
    return any(word in encoder.vectors for encoder in encoders)


def placeholder(number: int, start: str = "iterisword") -> str:
    """A placeholder word for a tokenizer: lower-case letters, which prompt cleaning leaves
    alone."""
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
            call, mark = triggers[owner].words[word], placeholder(number)
            brought = triggers[owner].embeddings[call.name]
            if give(encoders, mark, {part: call.of(some) for part, some in brought.items()}):
                self._marks[owner, word] = mark
                self.in_force[owner].add(call.name)
        self.words = {mark: word for (_, word), mark in self._marks.items()}

    def __call__(self, owner: int, prompt: str, spell: Callable[[str], str] = str) -> str:
        """``spell`` formats a mark."""
        if owner >= len(self._triggers):
            return prompt

        def say(word: str, _: EmbeddingRef) -> str:
            mark = self._marks.get((owner, word.lower()))
            return word if mark is None else spell(mark)

        return self._triggers[owner].replaced(prompt, say)


def _spellings(name: str) -> list[str]:
    """The words that refer to an embedding of that name, in lower case."""
    core = name.strip("<>").lower()
    words = [name.lower(), f"<{core}>", core, f"embedding:{name.lower()}", f"embedding:{core}"]
    # A name such as "<>" leaves an empty word, which would match everywhere.
    return [word for word in dict.fromkeys(words) if word.removeprefix("embedding:").strip()]


def _said(words: Iterable[str], texts: Sequence[str]) -> dict[str, str]:
    """The ``words`` that occur in the texts, in their first spelling there; if one is part of
    another, the longer one wins."""
    pattern = _any_of(words)
    spellings: dict[str, str] = {}
    for text in texts:
        for match in pattern.finditer(text):
            spellings.setdefault(match[0].lower(), match[0])
    return spellings


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(_as_word, longest_first)), re.IGNORECASE)


def _as_word(word: str) -> str:
    """A pattern for ``word``, not inside another word or a path."""
    before = r"(?<![\w/<-])(?<!embedding:)" if re.match(r"[\w-]", word) else ""
    after = r"(?![\w-]|\.\w)" if re.search(r"[\w-]$", word) else ""
    return f"{before}{re.escape(word)}{after}"
