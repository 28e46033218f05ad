"""The rows of a host that works from prompts: their texts and latents.

The diffusers and ComfyUI hosts make the same rows from the same seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..calibration_prompts import (
    Wording,
    calling_words,
    concept_prompts,
    context_shares,
    in_random_order,
    prompt_pools,
    turns_of,
)
from ..composites import Composite, composites_of
from ..concepts import Calibration, Concept

GENERIC = "generic"
"""The name of the generic-prompt concept."""
_REPEATS = 2
"""How often a prompt counts, with new noise each time."""
_DENOISED_ALIKE = 16
"""Most samples of a concept that denoise the same prompt unchanged."""
_PRESERVED_ROWS = 0.4
"""Rows of a concept without a LoRA, as a share of the rows of one with a LoRA."""


@dataclass(frozen=True)
class TextRows:
    """Rows sorted by concept. ``text_owners`` and ``texts`` list the distinct (concept, prompt)
    pairs; ``text_rows`` gives each row's index into them. ``owners`` is each row's concept and
    ``latent_rows`` the index of its latent; concepts without a LoRA use latents of others."""

    owners: Sequence[int]
    text_rows: Sequence[int]
    text_owners: Sequence[int]
    texts: Sequence[str]
    latent_rows: Sequence[int]

    @staticmethod
    def of(
        owners: Sequence[int], prompts: Sequence[str], latent_rows: Sequence[int] | None = None
    ) -> TextRows:
        keys = list(zip(owners, prompts, strict=True))
        pairs = {pair: index for index, pair in enumerate(dict.fromkeys(keys))}
        return TextRows(
            owners,
            [pairs[key] for key in keys],
            [o for o, _ in pairs],
            [p for _, p in pairs],
            range(len(owners)) if latent_rows is None else latent_rows,
        )


def added_concepts(
    concepts: Sequence[Concept], calibration: Calibration, vocabulary: Sequence[str]
) -> list[Concept]:
    """The concepts that a host with prompts adds to a merge: generic prompts, on which the base
    should not change, and composites, whose prompts :func:`.composites_of` makes."""
    rows = calibration.samples * calibration.rows_each
    generator = torch.Generator().manual_seed(calibration.seed)
    wording = Wording(vocabulary, concepts, generator)
    generic = _generic_concept(concepts, calibration, wording)
    composites = composites_of(concepts, calibration, wording, _preserved_rows(rows))
    return [*([] if generic is None else [generic]), *composites]


def _generic_concept(
    concepts: Sequence[Concept], calibration: Calibration, wording: Wording
) -> Concept | None:
    """None if the calibration disables it, if there is only one LoRA, or if a LoRA has no trigger
    word and should therefore act on every prompt."""
    loras = [concept for concept in concepts if concept.lora is not None]
    called = all(calling_words([concept]) for concept in loras)
    if not calibration.generic or len(loras) < 2 or not called:
        return None
    count = _preserved_rows(calibration.samples * calibration.rows_each)
    prompts = wording.generic(count)
    return Concept(None, prompts, trigger=GENERIC, weight=calibration.generic)


@dataclass(frozen=True)
class SamplePrompts:
    """The prompt and concept of every sample, in ascending order of concepts, and the texts of the
    rows made from them. ``empty_share`` of the rows get the empty prompt, because guidance runs on
    it."""

    owners: Sequence[int]
    prompts: Sequence[str]
    concepts: Sequence[Concept]
    calibration: Calibration
    wording: Wording
    empty_share: float = 0.0

    @staticmethod
    def drawn(
        concepts: Sequence[Concept],
        calibration: Calibration,
        vocabulary: Sequence[str],
        generator: torch.Generator,
        empty_share: float,
        *,
        denoises: bool,
    ) -> SamplePrompts:
        """Draw random prompts. If a concept has very few, a prompt gets extra words after its 16th
        use. If the host ``denoises``, concepts without a LoRA have no samples: their rows use the
        latents of others. Otherwise each concept also gets the empty prompt once, if there is an
        ``empty_share``."""
        wording = Wording(vocabulary, concepts, generator)
        prompts = [
            concept_prompts(concept, calibration, generator) if concept.lora or not denoises else []
            for concept in concepts
        ]
        if calibration.contexts != 0:
            prompts = [_filled_up(of_concept, wording) for of_concept in prompts]
        if empty_share and not denoises:
            prompts = [[*of_concept, ""] for of_concept in prompts]
        return SamplePrompts(
            [concept for concept, of_concept in enumerate(prompts) for _ in of_concept],
            [prompt for of_concept in prompts for prompt in of_concept],
            concepts,
            calibration,
            wording,
            empty_share,
        )

    def texts(self, count: int | None) -> TextRows:
        """The texts of ``count`` rows per sample. Some rows get the empty prompt, but never all of
        a phrase, and some of the others get extra words. Concepts without a LoRA get rows on some
        of the same latents (composites: on those of their parts), because noisy latents hardly
        depend on the prompt. With None (no denoiser runs) each sample is one row."""
        if count is None:
            return TextRows.of(self.owners, self._in_contexts(self.owners, self.prompts))
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
                wanted = _preserved_rows(most)
                if isinstance(concept, Composite):
                    wanted = min(wanted, len(pool))
                    free = [row for row in free if concept.has(self.concepts[row_owners[row]])]
                said = in_random_order(pool, wanted, generator)
                picks = torch.randint(len(free), (wanted,), generator=generator).tolist()
                rows += [(owner, p, free[pick]) for p, pick in zip(said, picks, strict=True)]
        rows.sort(key=lambda row: row[0])
        return TextRows.of([o for o, _, _ in rows], [p for _, p, _ in rows], [n for *_, n in rows])

    def _in_contexts(self, owners: Sequence[int], prompts: Sequence[str]) -> list[str]:
        """``prompts``, where a share given by :func:`context_shares` gets extra words. The empty
        prompt stays."""
        if self.calibration.contexts == 0:
            return list(prompts)
        shares = context_shares(self.concepts, self.calibration)
        chosen = self.wording.chosen([shares[owner] for owner in owners])
        return [
            self.wording.in_context(prompt) if more and prompt else prompt
            for prompt, more in zip(prompts, chosen, strict=True)
        ]

    def worth(self, text: TextRows) -> int:
        """The effective number of samples of the concept with a LoRA and the fewest distinct
        prompts; with new noise, a repeated prompt counts once more."""
        prompts = Counter(o for o, p in zip(text.text_owners, text.texts, strict=True) if p)
        own = [prompts[o] for o, concept in enumerate(self.concepts) if concept.lora is not None]
        return min(self.calibration.samples, _REPEATS * min(own, default=0))


def drawn_steps(
    count: int, calibration: Calibration, steps: int, generator: torch.Generator
) -> Tensor:
    """The denoising steps, out of ``steps``, at which each of ``count`` samples is recorded,
    ascending, (count, timesteps)."""
    picks = [torch.randperm(steps, generator=generator) for _ in range(count)]
    return torch.stack([pick[: calibration.rows_each] for pick in picks]).sort(dim=1)[0]


def _filled_up(prompts: Sequence[str], wording: Wording) -> list[str]:
    seen: Counter[str] = Counter()
    filled: list[str] = []
    for prompt in prompts:
        seen[prompt] += 1
        filled.append(wording.in_context(prompt) if seen[prompt] > _DENOISED_ALIKE else prompt)
    return filled


def _preserved_rows(rows: int) -> int:
    return max(1, round(_PRESERVED_ROWS * rows))
