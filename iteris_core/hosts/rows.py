"""The rows of a host that works from prompts: which text, and what the denoiser sees.

The host of diffusers and that of ComfyUI make the same ones from the same seed.
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
)
from ..composites import Composite, composites_of
from ..concepts import Calibration, Concept

GENERIC = "generic"
"""What the concept of generic prompts is called."""
_REPEATS = 2
"""How often a prompt counts, with other noise each time."""
_DENOISED_ALIKE = 16
"""How many samples of a concept denoise the same prompt as it is."""
_PRESERVED_ROWS = 0.4
"""Rows of a concept without a LoRA, as a share of those of one that has one."""


@dataclass(frozen=True)
class TextRows:
    """Rows sorted by concept. ``text_owners`` and ``texts`` list the distinct (concept, prompt)
    pairs, and ``text_rows`` says which of them each row uses; ``owners`` is the concept of each,
    and ``latent_rows`` the number of the latent that it has: those of concepts without a LoRA have
    latents of others."""

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
    """What a host with prompts adds to the ``concepts`` of a merge: generic prompts, on which the
    base is to stay as it is, and composites, of which :func:`.composites_of` makes the prompts."""
    rows = calibration.samples * calibration.timesteps
    generator = torch.Generator().manual_seed(calibration.seed)
    wording = Wording(vocabulary, concepts, generator)
    generic = _generic_concept(concepts, calibration, wording)
    composites = composites_of(concepts, calibration, wording, generator, _preserved_rows(rows))
    return [*([] if generic is None else [generic]), *composites]


def _generic_concept(
    concepts: Sequence[Concept], calibration: Calibration, wording: Wording
) -> Concept | None:
    """None where the calibration wants none, where one LoRA is alone, or where no word calls for
    one of them, so that it is to act on every prompt."""
    loras = [concept for concept in concepts if concept.lora is not None]
    called = all(calling_words([concept]) for concept in loras)
    if not calibration.generic or len(loras) < 2 or not called:
        return None
    count = _preserved_rows(calibration.samples * calibration.timesteps)
    prompts = wording.generic(count)
    return Concept(None, prompts, trigger=GENERIC, weight=calibration.generic)


def drawn_prompts(
    concepts: Sequence[Concept],
    calibration: Calibration,
    wording: Wording,
    generator: torch.Generator,
    *,
    denoises: bool,
    empty: bool,
) -> tuple[list[int], list[str]]:
    """The concept and the prompt of every sample. A prompt that comes more than 16 times, where a
    concept has very few, carries further words from then on. What ``denoises`` has no samples of
    concepts without a LoRA, whose rows take the latents of others (:func:`row_texts`). With
    ``empty`` each concept has the empty prompt once more, as where no denoiser runs whose rows
    could have it."""
    prompts = [
        concept_prompts(concept, calibration, generator) if concept.lora or not denoises else []
        for concept in concepts
    ]
    if calibration.contexts != 0:
        prompts = [_filled_up(of_concept, wording) for of_concept in prompts]
    if empty:
        prompts = [[*of_concept, ""] for of_concept in prompts]
    owners = [concept for concept, of_concept in enumerate(prompts) for _ in of_concept]
    return owners, [prompt for of_concept in prompts for prompt in of_concept]


def _filled_up(prompts: Sequence[str], wording: Wording) -> list[str]:
    seen: Counter[str] = Counter()
    found: list[str] = []
    for prompt in prompts:
        seen[prompt] += 1
        found.append(wording.in_context(prompt) if seen[prompt] > _DENOISED_ALIKE else prompt)
    return found


def drawn_steps(
    count: int, calibration: Calibration, steps: int, generator: torch.Generator
) -> Tensor:
    """Which of the ``steps`` of a denoising each of ``count`` samples is kept at, ascending,
    (count, timesteps)."""
    picks = [torch.randperm(steps, generator=generator) for _ in range(count)]
    return torch.stack([pick[: calibration.timesteps] for pick in picks]).sort(dim=1)[0]


def in_contexts(
    owners: Sequence[int],
    prompts: Sequence[str],
    concepts: Sequence[Concept],
    calibration: Calibration,
    wording: Wording,
) -> list[str]:
    """``prompts``, of which :func:`context_shares` carry further words. The empty prompt stays."""
    if calibration.contexts == 0:
        return list(prompts)
    shares = context_shares(concepts, calibration)
    chosen = wording.chosen([shares[owner] for owner in owners])
    return [
        wording.in_context(prompt) if more and prompt else prompt
        for prompt, more in zip(prompts, chosen, strict=True)
    ]


def row_texts(
    owners: Sequence[int],
    prompts: Sequence[str],
    count: int,
    empty_share: float,
    concepts: Sequence[Concept],
    calibration: Calibration,
    wording: Wording,
    generator: torch.Generator,
) -> TextRows:
    """The texts of ``count`` rows for each sample, and of rows of the ``concepts`` without a LoRA
    on some of the same latents (composites: on those of their parts): what the denoiser sees of
    noise hardly depends on the prompt. A
    share of the samples' rows gets the empty prompt, since guidance runs on it, but never all of a
    concept's; a share of the others carries further words."""
    row_owners = [owner for owner in owners for _ in range(count)]
    row_prompts = [prompt for prompt in prompts for _ in range(count)]
    empty = torch.rand(len(row_owners), generator=generator) < empty_share
    for owner in dict.fromkeys(row_owners):
        own = [row for row, of in enumerate(row_owners) if of == owner]
        if bool(empty[own].all()):
            empty[own[0]] = False
    for row in empty.nonzero().flatten().tolist():
        row_prompts[row] = ""
    row_prompts = in_contexts(row_owners, row_prompts, concepts, calibration, wording)
    rows = list(zip(row_owners, row_prompts, range(len(row_owners)), strict=True))
    most = max(row_owners.count(owner) for owner in set(row_owners))
    for owner, concept in enumerate(concepts):
        if concept.lora is None:
            pool = [p for of_phrase in prompt_pools(concept, calibration) for p in of_phrase]
            free = range(len(row_owners))
            wanted = _preserved_rows(most)
            if isinstance(concept, Composite):
                wanted = min(wanted, len(pool))
                free = [row for row in free if concept.has(concepts[row_owners[row]])]
            said = in_random_order(pool, wanted, generator)
            picks = torch.randint(len(free), (wanted,), generator=generator).tolist()
            rows += [(owner, p, free[pick]) for p, pick in zip(said, picks, strict=True)]
    rows.sort(key=lambda row: row[0])
    return TextRows.of([o for o, _, _ in rows], [p for _, p, _ in rows], [n for *_, n in rows])


def fewest_prompts(text: TextRows, concepts: Sequence[Concept], calibration: Calibration) -> int:
    """What the samples of the concept with the fewest distinct prompts are worth, of those that
    have a LoRA: with other noise a prompt counts once more."""
    prompts = Counter(o for o, p in zip(text.text_owners, text.texts, strict=True) if p)
    own = [prompts[o] for o, concept in enumerate(concepts) if concept.lora is not None]
    return min(calibration.samples, _REPEATS * min(own, default=0))


def _preserved_rows(rows: int) -> int:
    return max(1, round(_PRESERVED_ROWS * rows))
