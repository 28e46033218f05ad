"""The rows of a merge on MODEL and CLIP: which text, and what each denoiser sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..iteris_core.hosts.rows import TextRows, noisy_rows
from .comfy_sampling import Kept


@dataclass(frozen=True)
class DenoiserRows:
    """What a denoiser sees: latents on ComfyUI's scale, (rows, …), and their sigmas, of the
    ``schedule`` that it runs through; ``text_rows`` says which text each row uses."""

    owners: Sequence[int]
    text_rows: Sequence[int]
    latents: Tensor
    times: Tensor
    schedule: Tensor


@dataclass(frozen=True)
class ComfySamples:
    """``tokens`` are those of every text; ``noisy`` is of each denoiser, and empty where no site
    needs one."""

    text: TextRows
    tokens: Sequence[Any]
    noisy: Sequence[DenoiserRows] = ()


def comfy_samples(
    owners: Sequence[int],
    prompts: Sequence[str],
    found: Sequence[Kept],
    empty_share: float,
    generator: torch.Generator,
    tokenize: Callable[[Sequence[int], Sequence[str]], Sequence[Any]],
) -> ComfySamples:
    """A row for each latent that a denoiser was given for the samples of ``owners`` and
    ``prompts``; a share of them gets the empty prompt."""
    parts = [
        noisy_rows(owners, prompts, kept.latents, kept.sigmas, empty_share, generator)
        for kept in found
    ]
    rows = [(part, row) for part, _ in parts for row in range(len(part.owners))]
    text = TextRows.of(
        [part.owners[row] for part, row in rows],
        [part.texts[part.text_rows[row]] for part, row in rows],
    )
    which = iter(text.text_rows)
    noisy = [
        DenoiserRows(
            part.owners,
            list(islice(which, len(part.owners))),
            noisy.latents,
            noisy.times,
            kept.schedule,
        )
        for (part, noisy), kept in zip(parts, found, strict=True)
    ]
    return ComfySamples(text, tokenize(text.text_owners, text.texts), noisy)
