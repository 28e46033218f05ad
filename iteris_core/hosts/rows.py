"""The rows of a host that works from prompts: which text, and what the denoiser sees.

The host of diffusers and that of ComfyUI make the same ones from the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concepts import Calibration, Concept, concept_prompts


@dataclass(frozen=True)
class TextRows:
    """Rows sorted by concept. ``text_owners`` and ``texts`` list the distinct (concept, prompt)
    pairs, and ``text_rows`` says which of them each row uses; ``owners`` is the concept of each."""

    owners: Sequence[int]
    text_rows: Sequence[int]
    text_owners: Sequence[int]
    texts: Sequence[str]

    @staticmethod
    def of(owners: Sequence[int], prompts: Sequence[str]) -> TextRows:
        keys = list(zip(owners, prompts, strict=True))
        pairs = {pair: index for index, pair in enumerate(dict.fromkeys(keys))}
        return TextRows(
            owners, [pairs[key] for key in keys], [o for o, _ in pairs], [p for _, p in pairs]
        )


@dataclass(frozen=True)
class NoisyRows:
    """What the denoiser sees: ``latents`` (rows, …), as it takes them, and their times (rows,)."""

    latents: Tensor
    times: Tensor


def drawn_prompts(
    concepts: Sequence[Concept], calibration: Calibration, generator: torch.Generator, empty: bool
) -> tuple[list[int], list[str]]:
    """The concept and the prompt of every sample; with ``empty`` each concept has the empty prompt
    once more, as where no denoiser runs whose rows could have it."""
    prompts = [concept_prompts(concept, calibration, generator) for concept in concepts]
    if empty:
        prompts = [[*of_concept, ""] for of_concept in prompts]
    owners = [concept for concept, of_concept in enumerate(prompts) for _ in of_concept]
    return owners, [prompt for of_concept in prompts for prompt in of_concept]


def drawn_steps(
    count: int, calibration: Calibration, steps: int, generator: torch.Generator
) -> Tensor:
    """Which of the ``steps`` of a denoising each of ``count`` samples is kept at, ascending,
    (count, timesteps)."""
    picks = [torch.randperm(steps, generator=generator) for _ in range(count)]
    return torch.stack([pick[: calibration.timesteps] for pick in picks]).sort(dim=1)[0]


def noisy_rows(
    owners: Sequence[int],
    prompts: Sequence[str],
    latents: Tensor,
    times: Tensor,
    empty_share: float,
    generator: torch.Generator,
) -> tuple[TextRows, NoisyRows]:
    """A row for each of a sample's ``latents``, (samples, T, …), and ``times``, (samples, T); a
    share of them gets the empty prompt, since guidance runs on it too."""
    text = row_texts(owners, prompts, times.shape[1], empty_share, generator)
    return text, NoisyRows(latents.flatten(0, 1), times.flatten())


def row_texts(
    owners: Sequence[int],
    prompts: Sequence[str],
    count: int,
    empty_share: float,
    generator: torch.Generator,
) -> TextRows:
    """The texts of ``count`` rows for each sample; a share of them gets the empty prompt, but never
    all of a concept's."""
    row_owners = [owner for owner in owners for _ in range(count)]
    row_prompts = [prompt for prompt in prompts for _ in range(count)]
    empty = torch.rand(len(row_owners), generator=generator) < empty_share
    for owner in dict.fromkeys(row_owners):
        own = [row for row, of in enumerate(row_owners) if of == owner]
        if bool(empty[own].all()):
            empty[own[0]] = False
    for row in empty.nonzero().flatten().tolist():
        row_prompts[row] = ""
    return TextRows.of(row_owners, row_prompts)
