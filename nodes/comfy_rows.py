"""The rows of a merge on MODEL and CLIP: which text, and what each denoiser sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from ..iteris_core.hosts.rows import SamplePrompts, TextRows
from .comfy_sampling import Kept


@dataclass(frozen=True)
class DenoiserRows:
    """A denoiser's inputs: latents on ComfyUI's scale, (rows, …), and their sigmas, of the
    ``schedule`` that it runs through; ``text_rows`` says which text each row uses."""

    owners: Sequence[int]
    text_rows: Sequence[int]
    latents: Tensor
    times: Tensor
    schedule: Tensor


@dataclass(frozen=True)
class ComfySamples:
    """``tokens`` are those of every text, ``worth`` is how many samples of a concept the rows are
    worth; ``noisy`` is of each denoiser, and empty where no site needs one."""

    text: TextRows
    tokens: Sequence[Any]
    worth: int
    noisy: Sequence[DenoiserRows] = ()


def comfy_samples(
    kept_by: Sequence[Kept],
    drawn: SamplePrompts,
    tokenize: Callable[[Sequence[int], Sequence[str]], Sequence[Any]],
) -> ComfySamples:
    """A row for each latent that a denoiser was given, and those that ``drawn`` adds on the same
    latents."""
    parts = [drawn.texts(kept.picks.shape[1]) for kept in kept_by] or [drawn.texts(None)]
    text = TextRows.of(
        [owner for part in parts for owner in part.owners],
        [part.texts[row] for part in parts for row in part.text_rows],
    )
    which = iter(text.text_rows)
    noisy = [
        DenoiserRows(
            part.owners,
            list(islice(which, len(part.owners))),
            kept.latents.flatten(0, 1)[list(part.latent_rows)],
            kept.sigmas.flatten()[list(part.latent_rows)],
            kept.schedule,
        )
        for part, kept in zip(parts, kept_by, strict=False)  # without a denoiser there are none
    ]
    return ComfySamples(text, tokenize(text.text_owners, text.texts), drawn.worth(text), noisy)
