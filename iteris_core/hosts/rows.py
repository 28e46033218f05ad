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
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations.rows import Load, Loads, Row, loads_of
from ..calibration import Calibration
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
from ..concepts import Concept
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
    """The prompt and concept of every sample of a ``request``, in ascending order of concepts, and
    the rows made from them. A concept's of the ``generators`` draws its prompts and noise, which so
    do not depend on what else is merged. ``empty_share`` of the rows get the empty prompt, because
    guidance runs on it."""

    request: SampleRequest
    owners: Sequence[int]
    prompts: Sequence[str]
    wording: Wording
    generators: Sequence[torch.Generator] = ()
    empty_share: float = 0.0

    @staticmethod
    def drawn(
        request: SampleRequest, vocabulary: Sequence[str], empty_share: float
    ) -> SamplePrompts:
        """Draw random prompts. If a concept has very few, a prompt gets extra words after its 16th
        use. Concepts without a LoRA have no samples: their rows use the latents of others."""
        concepts, calibration = request.concepts, request.calibration
        wording = Wording(vocabulary, concepts, request.generator, held_out=request.held_out)
        owners: list[int] = []
        prompts: list[str] = []
        generators: list[torch.Generator] = []
        for owner, concept in enumerate(concepts):
            listed = None if concept.prompts is None else [*map(str, concept.prompts)]
            words = calibration.seed, concept.trigger, concept.class_word, list(concept.subjects)
            seed = zlib.crc32(repr([*words, listed]).encode())
            generators.append(torch.Generator().manual_seed(seed))
            if concept.lora is None:
                continue
            seen: Counter[str] = Counter()
            for prompt in concept_prompts(concept, calibration, generators[-1]):
                seen[prompt] += 1
                often = calibration.contexts != 0 and seen[prompt] > _DENOISED_ALIKE
                owners.append(owner)
                prompts.append(wording.in_context(prompt) if often else prompt)
        return SamplePrompts(request, owners, prompts, wording, generators, empty_share)

    def kept(
        self, prompts: Sequence[str], digest_of_base: Callable[[], str | None]
    ) -> tuple[dict[int, Mapping[str, Tensor]], Callable[[int, Mapping[str, Tensor]], None]]:
        """The samples' tensors by concept, of those that the request's store has; and
        ``keep(concept, tensors)`` for the others. They depend on the ``prompts`` as the pipeline
        gets them, and on the base; nothing is kept of noise, or of a base without a digest."""
        store, tensors = self.request.store, dict[int, Mapping[str, Tensor]]()
        base = None
        if store is not None and self.request.calibration.latents != "noise":
            base = digest_of_base()
        if store is None or base is None:
            return tensors, tensors.__setitem__
        store = store.within(base)
        keys = {owner: self._key(owner, prompts) for owner in set(self.owners)}
        for owner, key in keys.items():
            if (known := store.get(key)) is not None:
                tensors[owner] = known

        def keep(owner: int, of_concept: Mapping[str, Tensor]) -> None:
            store.put(of_concept, keys[owner])
            tensors[owner] = of_concept

        return tensors, keep

    def _key(self, owner: int, prompts: Sequence[str]) -> str:
        """A hash of what a concept's samples depend on beside the base: its ``prompts``, its LoRA,
        its noise and how it is denoised."""
        calibration, concept = self.request.calibration, self.request.concepts[owner]
        changes = {
            site: change
            for site, of_site in self.request.lockstep.changes.items()
            if (change := of_site.by_concept[owner])
        }
        return digest(
            [
                [text for text, of in zip(prompts, self.owners, strict=True) if of == owner],
                [(site, change.up, change.down) for site, change in sorted(changes.items())],
                {} if concept.lora is None else concept.lora.embeddings,
                *(self.generators[owner].initial_seed(), calibration.rows_each),
                *(calibration.guidance, calibration.latents, calibration.denoising_steps),
                *(calibration.latent_size, calibration.frames),
            ]
        )

    def rows(self, count: int) -> list[Row]:
        """``count`` rows per sample, sorted by concept. Some get the empty prompt, but never all of
        a phrase, and some of the others get extra words. Concepts without a LoRA get rows on some
        of the same latents (composites: on those of their parts), because noisy latents hardly
        depend on the prompt."""
        owners = [owner for owner in self.owners for _ in range(count)]
        prompts = [prompt for prompt in self.prompts for _ in range(count)]
        concepts, calibration = self.request.concepts, self.request.calibration
        generator = self.wording.generator
        empty = torch.rand(len(owners), generator=generator) < self.empty_share
        turns = [turns_of(concept) for concept in concepts]
        taken, of_phrase = Counter[int](), dict[tuple[int, int], list[int]]()
        for sample, owner in enumerate(self.owners):
            mine = of_phrase.setdefault((owner, taken[owner] % turns[owner]), [])
            mine += range(sample * count, (sample + 1) * count)
            taken[owner] += 1
        for mine in of_phrase.values():
            if bool(empty[mine].all()):
                empty[mine[0]] = False
        for row in empty.nonzero().flatten().tolist():
            prompts[row] = ""
        if calibration.contexts != 0:
            shares = context_shares(concepts, calibration)
            chances = torch.tensor([shares[owner] for owner in owners])
            chosen = (torch.rand(len(owners), generator=generator) < chances).tolist()
            prompts = [
                self.wording.in_context(prompt) if more and prompt else prompt
                for prompt, more in zip(prompts, chosen, strict=True)
            ]
        drawn = list(zip(owners, prompts, range(len(owners)), strict=True))
        most = max(Counter(owners).values())
        for owner, concept in enumerate(concepts):
            if concept.lora is None:
                pool = [p for pool in prompt_pools(concept, calibration) for p in pool]
                latents = range(len(owners))
                wanted = max(1, round(_PRESERVED_ROWS * most))
                if isinstance(concept, Composite):
                    wanted = min(wanted, len(pool))
                    latents = [at for at in latents if concept.has(concepts[owners[at]])]
                texts = in_random_order(pool, wanted, generator)
                picks = torch.randint(len(latents), (wanted,), generator=generator).tolist()
                drawn += [(owner, t, latents[at]) for t, at in zip(texts, picks, strict=True)]
        drawn.sort(key=lambda row: row[0])
        loras = [i for i, concept in enumerate(concepts) if concept.lora is not None]
        samples = [(owner, latent // count) for owner, _, latent in drawn]
        place = {id(concept): number for number, concept in enumerate(concepts)}
        loaded = [[owner] for owner in range(len(concepts))]
        for owner, concept in enumerate(concepts):
            if isinstance(concept, Composite):
                loaded[owner] = [place[id(part)] for part in concept.parts]
        uses = drawn_uses(samples, loras, calibration)
        return [
            Row(owner, number, prompt, latent, *use.of(loaded[owner]))
            for number, ((owner, prompt, latent), use) in enumerate(zip(drawn, uses, strict=True))
        ]

    def effective_samples(self, rows: Sequence[Row]) -> int:
        """The effective number of samples of the concept with a LoRA and the fewest distinct
        prompts; with new noise, a repeated prompt counts once more."""
        distinct = {(row.concept, row.prompt) for row in rows if row.prompt}
        prompts = Counter(owner for owner, _ in distinct)
        fewest = min((prompts[owner] for owner in self.owners), default=0)
        return min(self.request.calibration.samples, _REPEATS * fewest)


def drawn_steps(
    count: int, calibration: Calibration, steps: int, generator: torch.Generator
) -> Tensor:
    """The steps at which each of ``count`` samples is recorded, ascending, (count, timesteps)."""
    picks = [torch.randperm(steps, generator=generator) for _ in range(count)]
    return torch.stack([pick[: calibration.rows_each] for pick in picks]).sort(dim=1)[0]


class Use(NamedTuple):
    """How a row loads its LoRAs: at which ``strength``, in the text encoders at ``text``, and
    beside which phantoms."""

    strength: float = 1.0
    text: float = 1.0
    beside: Loads = ()

    def of(self, concepts: Sequence[int]) -> tuple[Loads, Loads]:
        """What the denoiser loads, and what the text encoders do."""
        denoiser, text = (loads_of(concepts, at) for at in (self.strength, self.text))
        return (*self.beside, *denoiser), (*self.beside, *text)


def drawn_uses(
    samples: Sequence[Hashable], loras: Sequence[int], calibration: Calibration
) -> list[Use]:
    """Every row's use: plain, but for a share of the rows, spread over each sample's steps. Those
    of one sample, which ``samples`` names by row, have the same. ``loras`` are the concepts of
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
            known[sample] = Use(denoiser, text)
            if draw.random() < _BESIDE_ANOTHER:
                phantom = Load(draw.choice(loras), draw.uniform(*_BESIDE), draw.randrange(1 << 32))
                known[sample] = Use(denoiser, text, (phantom,))
        uses[row] = known[sample]
    return uses
