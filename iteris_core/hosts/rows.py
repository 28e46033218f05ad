"""The rows of a host that works from prompts: their texts, latents and how the LoRAs are loaded.

The diffusers and ComfyUI hosts make the same rows from the same seed. A merge is fitted to what its
rows show. With all of them at strength 1 and nothing beside, five LoRAs break at strength 1.2 or
beside a sixth (docs/decisions.md, "A change is bounded, and rows stand for other uses"). So a share
of the rows is at other strengths, or beside another LoRA.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.site import PLAIN, Condition
from ..calibration_prompts import (
    Composite,
    Wording,
    calling_words,
    composites_of,
    concept_prompts,
    context_shares,
    in_random_order,
    prompt_pools,
    templates_of,
    turns_of,
)
from ..concepts import Calibration, Concept
from .protocol import SampleRequest
from .sample_store import digest

GENERIC, CLASSES = "generic", "class words"
"""The names of the concepts of generic prompts and of class words alone."""
_REPEATS = 2
"""How often a prompt counts, with new noise each time."""
_DENOISED_ALIKE = 16
"""Most samples of a concept that denoise the same prompt unchanged."""
_PRESERVED_ROWS = 0.4
"""Rows of a concept without a LoRA, as a share of the rows of one with a LoRA."""
_GOLDEN = 0.618034
_STRENGTHS = 0.6, 1.3
_BESIDE = 0.3, 1.0
_AT_STRENGTHS, _BESIDE_ANOTHER = 0.5, 0.7
"""How many of the rows that are not plain are at other strengths, and how many beside a phantom."""


@dataclass(frozen=True)
class Use:
    """A row's condition in the text encoders, and in the denoiser."""

    text: Condition = PLAIN
    denoiser: Condition = PLAIN


@dataclass(frozen=True)
class TextRows:
    """Rows sorted by concept. ``text_owners``, ``texts`` and ``text_conditions`` list the distinct
    (concept, prompt, condition); ``text_rows`` gives each row's index into them. ``owners`` is each
    row's concept, ``latent_rows`` the index of its latent, and ``conditions`` how it uses the
    denoiser's LoRAs; concepts without a LoRA use latents of others."""

    owners: Sequence[int]
    text_rows: Sequence[int]
    text_owners: Sequence[int]
    texts: Sequence[str]
    latent_rows: Sequence[int]
    text_conditions: Sequence[Condition]
    conditions: Sequence[Condition]

    @staticmethod
    def of(
        owners: Sequence[int],
        prompts: Sequence[str],
        latent_rows: Sequence[int] | None = None,
        uses: Sequence[Use] | None = None,
    ) -> TextRows:
        uses = uses or [Use()] * len(owners)
        keys = list(zip(owners, prompts, (use.text for use in uses), strict=True))
        texts = {key: index for index, key in enumerate(dict.fromkeys(keys))}
        return TextRows(
            owners,
            [texts[key] for key in keys],
            [owner for owner, _, _ in texts],
            [prompt for _, prompt, _ in texts],
            range(len(owners)) if latent_rows is None else latent_rows,
            [condition for *_, condition in texts],
            [use.denoiser for use in uses],
        )

    @property
    def loaded(self) -> list[tuple[int, Condition]]:
        """What is loaded in the text encoders for every text: a concept's LoRA, and how."""
        return list(zip(self.text_owners, self.text_conditions, strict=True))

    @property
    def uses(self) -> list[Use]:
        """Every row's use."""
        of_texts = (self.text_conditions[row] for row in self.text_rows)
        return [Use(text, own) for text, own in zip(of_texts, self.conditions, strict=True)]


def added_concepts(
    concepts: Sequence[Concept], calibration: Calibration, vocabulary: Sequence[str]
) -> list[Concept]:
    """The concepts that a host with prompts adds to a merge: generic prompts and prompts with class
    words alone, on which the base should not change, and composites, whose prompts
    :func:`.composites_of` makes."""
    count = max(1, round(_PRESERVED_ROWS * (calibration.samples * calibration.rows_each)))
    generator = torch.Generator().manual_seed(calibration.seed)
    wording = Wording(vocabulary, concepts, generator)
    loras = [concept for concept in concepts if concept.lora is not None]
    added: list[Concept] = []
    # A LoRA without a trigger word should act on every prompt, and so may a single one.
    called = all(calling_words([concept]) for concept in loras)
    if calibration.generic and called and (len(loras) > 1 or calibration.class_words):
        prompts = wording.generic(count)
        added.append(Concept(None, prompts, trigger=GENERIC, weight=calibration.generic))
    prompts = [
        template.replace("{}", subject)
        for concept in loras
        if concept.trigger and concept.class_word
        for template in templates_of(concept, calibration)
        for subject in (concept.class_word, f"{wording.word()} {concept.class_word}".strip())
    ]
    if calibration.class_words and prompts:
        added.append(Concept(None, prompts, trigger=CLASSES, weight=calibration.class_words))
    return [*added, *composites_of(concepts, calibration, wording, count)]


@dataclass(frozen=True)
class SamplePrompts:
    """The prompt and concept of every sample, in ascending order of concepts, and the texts of the
    rows made from them. A concept's of the ``generators`` draws its prompts and noise, which so do
    not depend on what else is merged. ``empty_share`` of the rows get the empty prompt, because
    guidance runs on it."""

    owners: Sequence[int]
    prompts: Sequence[str]
    concepts: Sequence[Concept]
    calibration: Calibration
    wording: Wording
    generators: Sequence[torch.Generator]
    empty_share: float = 0.0

    @staticmethod
    def drawn(
        request: SampleRequest, vocabulary: Sequence[str], empty_share: float
    ) -> SamplePrompts:
        """Draw random prompts. If a concept has very few, a prompt gets extra words after its 16th
        use. Concepts without a LoRA have no samples: their rows use the latents of others."""
        concepts, calibration = request.concepts, request.calibration
        wording = Wording(vocabulary, concepts, request.generator, held_out=request.held_out)
        own: list[torch.Generator] = []
        prompts: list[list[str]] = []
        for concept in concepts:
            given = None if concept.prompts is None else [str(prompt) for prompt in concept.prompts]
            words = calibration.seed, concept.trigger, concept.class_word, list(concept.subjects)
            seed = zlib.crc32(repr([*words, given]).encode())
            own.append(torch.Generator().manual_seed(seed))
            prompts.append(concept_prompts(concept, calibration, own[-1]) if concept.lora else [])
            seen: Counter[str] = Counter()
            for index, prompt in enumerate(prompts[-1]) if calibration.contexts != 0 else ():
                seen[prompt] += 1
                if seen[prompt] > _DENOISED_ALIKE:
                    prompts[-1][index] = wording.in_context(prompt)
        return SamplePrompts(
            [concept for concept, of_concept in enumerate(prompts) for _ in of_concept],
            [prompt for of_concept in prompts for prompt in of_concept],
            concepts,
            calibration,
            wording,
            own,
            empty_share,
        )

    def key(self, owner: int, said: Sequence[str], lockstep: Lockstep) -> str:
        """A hash of what a concept's samples depend on beside the base: the prompts that are
        ``said``, its LoRA, its noise and how it is denoised."""
        given, concept = self.calibration, self.concepts[owner]
        own = {s: c for s, of in lockstep.changes.items() if (c := of.by_concept[owner])}
        return digest(
            [
                [text for text, of in zip(said, self.owners, strict=True) if of == owner],
                [(site, change.up, change.down) for site, change in sorted(own.items())],
                {} if concept.lora is None else concept.lora.embeddings,
                *(self.generators[owner].initial_seed(), given.rows_each, given.guidance),
                *(given.latents, given.denoising_steps, given.latent_size, given.frames),
            ]
        )

    def texts(self, count: int) -> TextRows:
        """The texts of ``count`` rows per sample. Some rows get the empty prompt, but never all of
        a phrase, and some of the others get extra words. Concepts without a LoRA get rows on some
        of the same latents (composites: on those of their parts), because noisy latents hardly
        depend on the prompt."""
        row_owners = [owner for owner in self.owners for _ in range(count)]
        row_prompts = [prompt for prompt in self.prompts for _ in range(count)]
        generator = self.wording.generator
        empty = torch.rand(len(row_owners), generator=generator) < self.empty_share
        turns = [turns_of(concept) for concept in self.concepts]
        taken, rows_of = Counter[int](), dict[tuple[int, int], list[int]]()
        for sample, owner in enumerate(self.owners):
            own = rows_of.setdefault((owner, taken[owner] % turns[owner]), [])
            own += range(sample * count, (sample + 1) * count)
            taken[owner] += 1
        for own in rows_of.values():
            if bool(empty[own].all()):
                empty[own[0]] = False
        for row in empty.nonzero().flatten().tolist():
            row_prompts[row] = ""
        row_prompts = self._in_contexts(row_owners, row_prompts)
        rows = list(zip(row_owners, row_prompts, range(len(row_owners)), strict=True))
        most = max(row_owners.count(owner) for owner in set(row_owners))
        for owner, concept in enumerate(self.concepts):
            if concept.lora is None:
                pools = prompt_pools(concept, self.calibration)
                pool = [prompt for of_phrase in pools for prompt in of_phrase]
                free = range(len(row_owners))
                wanted = max(1, round(_PRESERVED_ROWS * most))
                if isinstance(concept, Composite):
                    wanted = min(wanted, len(pool))
                    free = [row for row in free if concept.has(self.concepts[row_owners[row]])]
                said = in_random_order(pool, wanted, generator)
                picks = torch.randint(len(free), (wanted,), generator=generator).tolist()
                rows += [(owner, p, free[pick]) for p, pick in zip(said, picks, strict=True)]
        rows.sort(key=lambda row: row[0])
        owners, prompts, latents = map(list, zip(*rows, strict=True))
        loras = [i for i, concept in enumerate(self.concepts) if concept.lora is not None]
        samples = [(owner, latent // count) for owner, _, latent in rows]
        uses = drawn_uses(samples, loras, self.calibration)
        return TextRows.of(owners, prompts, latents, uses)

    def _in_contexts(self, owners: Sequence[int], prompts: Sequence[str]) -> list[str]:
        """``prompts``, a share of which gets extra words; the empty prompt stays."""
        if self.calibration.contexts == 0:
            return list(prompts)
        shares = context_shares(self.concepts, self.calibration)
        chosen = self.wording.chosen([shares[owner] for owner in owners])
        return [
            self.wording.in_context(prompt) if more and prompt else prompt
            for prompt, more in zip(prompts, chosen, strict=True)
        ]

    def effective_samples(self, text: TextRows) -> int:
        """The effective number of samples of the concept with a LoRA and the fewest distinct
        prompts; with new noise, a repeated prompt counts once more."""
        distinct = set(zip(text.text_owners, text.texts, strict=True))
        prompts = Counter(owner for owner, prompt in distinct if prompt)
        own = [prompts[o] for o, concept in enumerate(self.concepts) if concept.lora is not None]
        return min(self.calibration.samples, _REPEATS * min(own, default=0))


def drawn_steps(
    count: int, calibration: Calibration, steps: int, generator: torch.Generator
) -> Tensor:
    """The steps at which each of ``count`` samples is recorded, ascending, (count, timesteps)."""
    picks = [torch.randperm(steps, generator=generator) for _ in range(count)]
    return torch.stack([pick[: calibration.rows_each] for pick in picks]).sort(dim=1)[0]


def drawn_uses(
    samples: Sequence[Hashable], loras: Sequence[int], calibration: Calibration
) -> list[Use]:
    """The use of every row: plain, but for a share of the rows, spread over each sample's steps.
    Those of one sample, which ``samples`` names by row, have one use. ``loras`` are the concepts of
    which phantoms can be made."""
    draw = random.Random(calibration.seed)
    known: dict[Hashable, Use] = {}
    uses = [Use()] * len(samples)
    for row, sample in enumerate(samples):
        if row * _GOLDEN % 1 >= (calibration.conditions or 0.0):
            continue
        if sample not in known:
            text = denoiser = 1.0
            if draw.random() < _AT_STRENGTHS:  # of both together, or of the text encoders apart
                text = denoiser = draw.uniform(*_STRENGTHS)
                apart = draw.random()
                text = draw.uniform(*_STRENGTHS) if apart < 0.5 else text
                denoiser = 1.0 if apart < 0.25 else denoiser
            known[sample] = Use(Condition(text), Condition(denoiser))
            if draw.random() < _BESIDE_ANOTHER:
                phantom = draw.choice(loras), draw.uniform(*_BESIDE), draw.randrange(1 << 32)
                known[sample] = Use(Condition(text, *phantom), Condition(denoiser, *phantom))
        uses[row] = known[sample]
    return uses
