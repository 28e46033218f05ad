"""Concepts to merge, and the calibration settings for collecting their features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import ConceptError, SettingsError
from .lora import Lora
from .lora_files.metadata import ALWAYS_ON, bare, find_phrases, noted_tags, parted, purpose_of
from .settings import Settings, setting

if TYPE_CHECKING:
    from .hosts.protocol import Host

PromptKind = Literal["subject", "style", "tags", "video"]
AlwaysOn = Literal["no", "include", "outside"]


def prompt_list(name: str) -> tuple[str, ...]:
    """The lines of ``prompts/NAME.txt``."""
    file = Path(__file__).parent / "prompts" / f"{name}.txt"
    return tuple(file.read_text(encoding="utf-8").splitlines())


TEMPLATES = prompt_list("templates")
KINDS: Mapping[PromptKind, tuple[str, ...]] = {
    "subject": TEMPLATES,
    "style": prompt_list("style"),
    "tags": prompt_list("tags"),
    "video": prompt_list("video"),
}
"""Templates by kind of concept: a thing, a style, booru tags, or a motion."""
PRESERVE_WEIGHT = 0.2
"""Weight of prompts on which the base model should not change; a large one weakens the concepts."""


class Phrased(ABC):
    """The words and the weight of a concept, whether its LoRA is read or still in a file."""

    if TYPE_CHECKING:  # each declares its own
        trigger: Any
        class_word: Any
        subjects: Any
        strength: Any
        text_strength: Any
        weight: Any

    @property
    def phrases(self) -> Sequence[str]:
        """The concept's trigger words with its class word; usually one phrase."""
        one = f"{self.trigger} {self.class_word}".strip()
        return self.subjects or ([one] if one else [])

    @property
    def subject(self) -> str:
        """All phrases of the concept in one prompt."""
        return " and ".join(self.phrases)

    @property
    def counts(self) -> bool:
        """False for weight 0, or strength 0 everywhere: the concept is left out of the merge."""
        return self.weight > 0 and (self.preserves or any((self.strength, self.text_strength)))

    @property
    @abstractmethod
    def preserves(self) -> bool:
        """True if there is no LoRA, only prompts on which the base should not change."""


@dataclass(frozen=True)
class Concept(Phrased, Settings):
    """One LoRA, its trigger words and its weight.

    ``prompts`` are used as they are; on others the merge keeps only a part of the LoRA. Without
    them, the templates of ``kind`` make prompts from ``trigger`` and ``class_word``, or from each
    of several ``subjects`` in turn (for a LoRA that is itself a merge). ``inputs``, or what calling
    it returns, are batches of keyword arguments for hosts that do not work from prompts.
    ``lora=None`` keeps the base model as it is, see :meth:`preserve`.

    ``always_on`` is for a LoRA that acts on every prompt: a speed LoRA (turbo, lightning), or a
    style, slider or detailer without a trigger. It is on while the others are merged. With
    ``include`` its change becomes part of the merged LoRA; with ``outside`` it is loaded beside it.
    Such a LoRA needs no words and no prompts.
    """

    lora: Lora | None
    prompts: Sequence[str] | None = None
    trigger: str = ""
    class_word: str = ""
    strength: float = setting(1.0, "The strength at which the LoRA would be loaded.")
    weight: float = setting(1.0, "How much the concept counts in the merge.", low=0)
    inputs: Iterable[Mapping[str, Any]] | Callable[[], Iterable[Mapping[str, Any]]] | None = None
    text_strength: float | None = setting(
        None, "The strength of the LoRA in the text encoders.", none="as strength"
    )
    subjects: Sequence[str] = ()
    kind: PromptKind = setting(  # noqa: RUF009
        "subject", "The kind of concept for which its prompts are made."
    )
    always_on: AlwaysOn = setting("no", "Whether the LoRA is always on.")  # noqa: RUF009

    def __post_init__(self) -> None:
        """Raise :class:`ConceptError` for a field of the wrong type or out of range."""
        if isinstance(self.lora, str | Path):
            raise ConceptError(
                f"Concept({str(self.lora)!r}): a concept needs a LoRA, not a file name; pass "
                f"host.read_lora({str(self.lora)!r}), which reads it for the base model."
            )
        for name in ("prompts", "subjects"):
            given = getattr(self, name)
            if isinstance(given, Iterable) and not isinstance(given, Sequence):
                object.__setattr__(self, name, list(given))  # which may be iterated only once
            if isinstance(given, str):
                raise ConceptError(
                    f"{self.name}: {name} must be a list of strings, not one string; pass "
                    f"{name}=[{given!r}]."
                )
        try:
            super().__post_init__()
        except SettingsError as error:
            raise ConceptError(f"{self.name}: {error}") from None

    @classmethod
    def from_file(cls, host: Host, path: str | Path, **values: Any) -> Concept:
        """The LoRA in a file, read for the base model of ``host``.

        ``values`` are the other fields, such as ``strength=0.8``; :func:`recognised` adds to them.
        Raises :class:`LoraFileError` for a file that cannot be read.
        """
        if not hasattr(host, "read_lora"):
            raise ConceptError(
                f"{type(host).__name__} reads no LoRA; pass Concept.from_file a host for it, such "
                "as DiffusersHost(pipeline)."
            )
        lora = host.read_lora(path)
        found, _ = recognised(Path(path), lora.metadata, values.keys())
        return cls(lora, **{**found, **values})

    @classmethod
    def preserve(cls, prompts: Sequence[str], weight: float = PRESERVE_WEIGHT) -> Concept:
        """Prompts on which the base model should not change."""
        return cls(None, prompts, trigger="preserve", weight=weight)

    @property
    def name(self) -> str:
        return self.trigger or (self.lora.name if self.lora is not None else "") or "base"

    @property
    def preserves(self) -> bool:
        return self.lora is None


_STEPS = 4
LEAST_SAMPLES = 12
"""Per concept; with fewer, a merge keeps too little."""


@dataclass(frozen=True)
class Calibration(Settings):
    """Settings for the samples on which features are collected."""

    samples: int = setting(
        80,
        "Prompts per concept on which features are collected. Below 20 the merge fits its prompts "
        "too closely.",
        low=1,
        most=1000,
    )
    total_samples: int | None = setting(
        400,
        "Prompts of all LoRAs together; many LoRAs get fewer each, at least 12. Ignored for text "
        "models.",
        none="no limit, as when samples is set by itself",
        low=1,
        most=10_000,
    )
    minutes: float | None = setting(
        None,
        "Roughly how long the merge may take. Decides how many of the prompts run, at least 12 "
        "per concept. Ignored for text models.",
        none="no limit, all prompts run",
        above=0,
        most=1440,
        step=1.0,
    )
    timesteps: int | None = setting(
        None, "Latents per prompt, from different denoising steps.", none="4", low=1, most=10
    )
    latents: Literal["denoising", "noise"] = setting(
        "denoising",
        "denoising first denoises samples with each LoRA. noise skips this: faster, slightly "
        "worse.",
    )
    denoising_steps: int = setting(6, "Denoising steps for each LoRA's samples.", low=1, most=100)
    guidance: float = setting(
        1.0,
        "Above 1, samples are denoised with classifier-free guidance, at twice the cost.",
        low=0,
        most=30,
    )
    empty_share: float = setting(
        0.2,
        "Share of rows with the empty prompt, because guidance also runs on it.",
        low=0,
        below=1,
    )
    latent_size: int | None = setting(
        None,
        "Side length of the latents: image pixels divided by the model's compression.",
        none="set by the model: 1024 tokens at its middle block, at most its native size",
        low=1,
        most=256,
    )
    frames: int | None = setting(
        None, "Frames of a video, before compression.", none="9", low=1, most=1000
    )
    contexts: float | None = setting(
        None,
        "Share of a concept's rows whose prompt gets extra words before or after it, so that the "
        "merge also works on other prompts.",
        none="a quarter; half from six LoRAs on or with a style; more with few prompts",
        low=0,
        high=1,
    )
    generic: float = setting(
        0.2,
        "Weight of prompts that name no concept; a concept has 1. They preserve the base and "
        "what other words mean. 0 leaves them out.",
        low=0,
        most=10,
    )
    class_words: float = setting(
        0.0,
        "Weight of prompts with a class word and no trigger. They preserve the base.",
        low=0,
        most=10,
    )
    conditions: float | None = setting(
        None,
        "Share of rows at other strengths or beside a LoRA.",
        none="half; 0 behind gates",
        low=0,
        high=1,
    )
    composites: float = setting(
        0.2,
        "Weight of prompts that name a subject and a style at once; a concept has 1. Both LoRAs "
        "act on them. 0 leaves them out.",
        low=0,
        most=10,
    )
    templates: Sequence[str] = TEMPLATES
    """With "{}" for the concept."""
    seed: int = setting(
        0,
        "Seeds prompts and latents. The same seed gives the same LoRA.",
        low=0,
        high=0xFFFFFFFFFFFFFFFF,
    )

    def settled(self, loras: int, *, pictures: bool) -> Calibration:
        """A copy for a merge of that many LoRAs, with ``timesteps`` set and, for models of images,
        ``samples`` within ``total_samples``. Settled again, it stays the same."""
        samples = self.samples
        if pictures and self.total_samples is not None:
            each = max(LEAST_SAMPLES, self.total_samples // max(loras, 1))
            samples = min(samples, each)
        return replace(self, timesteps=self.rows_each, samples=samples)

    @property
    def rows_each(self) -> int:
        """Rows per sample."""
        return self.timesteps or min(_STEPS, self.denoising_steps)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "templates", tuple(self.templates))
        if self.timesteps is not None and self.timesteps > self.denoising_steps:
            raise SettingsError(
                f"timesteps is {self.timesteps}, but denoising_steps is {self.denoising_steps}: "
                f"set denoising_steps to {self.timesteps} or more."
            )
        if any(template.count("{}") != 1 for template in self.templates) or not self.templates:
            raise SettingsError('templates must hold "{}" where the concept goes, once.')


def over(values: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a calibration, ``given`` over ``values``. A number of samples that is given without
    a total counts for each LoRA."""
    return {**values, **({"total_samples": None} if "samples" in given else {}), **given}


def recognised(
    file: Path, metadata: Mapping[str, str], given: Collection[str]
) -> tuple[dict[str, Any], str]:
    """Fields of the concept in ``file`` but for those ``given``, from its name, its metadata and a
    download helper's notes beside it, and the source of the words as in :class:`FoundPhrases`: the
    trigger words; a style or booru tags as the kind; a speed LoRA, slider or detailer for which no
    words are given is always on, and part of the merged LoRA. See :func:`.purpose_of`."""
    worded = bool({"trigger", "class_word", "subjects", "prompts"} & set(given))
    found = find_phrases(file, metadata)
    purpose = None
    # A merged LoRA has the names of all that it was made of.
    if not {"kind", "always_on"} & set(given) and "iteris" not in metadata:
        purpose = purpose_of(file.name, metadata, noted_tags(file), found.phrases)
    if purpose in ALWAYS_ON and not worded:
        return {"always_on": "include"}, ""
    kind = {"kind": purpose} if purpose in get_args(PromptKind) else {}
    return (kind, "") if worded else ({**kind, **words_in(found.phrases)}, found.source)


def lines_of(text: str) -> list[str]:
    """The lines of ``text``, stripped, without empty ones."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def words_in(phrases: Sequence[str]) -> dict[str, Any]:
    """``trigger``, ``class_word`` and ``subjects`` for a :class:`Concept`. The trigger of a single
    phrase is its first word that is not common: "sks dog" becomes "sks" and "dog". If common words
    precede it, the phrase is the only subject; if there are no others, it is the trigger. Several
    phrases are kept as they are."""
    if len(phrases) != 1:
        return {"trigger": "", "class_word": "", "subjects": tuple(phrases)}
    phrase = bare(phrases[0])
    before, trigger, after = parted(phrase)
    return {
        "trigger": trigger or before,
        "class_word": "" if before else after,
        "subjects": (phrase,) if before and trigger else (),
    }
