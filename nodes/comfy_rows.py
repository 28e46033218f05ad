"""The rows of a merge on MODEL and CLIP: their texts and each denoiser's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from ..iteris_core.activations.conditions import Condition
from ..iteris_core.hosts.rows import SamplePrompts, TextRows
from .comfy_sampling import Kept


@dataclass(frozen=True)
class DenoiserRows:
    """A denoiser's inputs: latents on ComfyUI's scale, (rows, …), and their sigmas from the
    ``schedule``; ``text_rows`` gives each row's text."""

    owners: Sequence[int]
    text_rows: Sequence[int]
    latents: Tensor
    times: Tensor
    schedule: Tensor
    conditions: Sequence[Condition]


@dataclass(frozen=True)
class ComfySamples:
    """``tokens`` are those of every text, ``worth`` is the effective number of samples per concept;
    ``noisy`` has one entry per denoiser, and is empty if no site needs one."""

    text: TextRows
    tokens: Sequence[Any]
    worth: int
    noisy: Sequence[DenoiserRows] = ()

    def rows_of(self, denoiser: int) -> range:
        """The indices of a denoiser's rows among those of all."""
        start = sum(len(noisy.owners) for noisy in self.noisy[:denoiser])
        return range(start, start + len(self.noisy[denoiser].owners))


def comfy_samples(
    kept_by: Sequence[Kept],
    drawn: SamplePrompts,
    tokenize: Callable[[Sequence[int], Sequence[str]], Sequence[Any]],
) -> ComfySamples:
    """One row per recorded latent of a denoiser, plus those that ``drawn`` adds on the same
    latents."""
    parts = [drawn.texts(kept.picks.shape[1]) for kept in kept_by] or [drawn.texts(None)]
    text = TextRows.of(
        [owner for part in parts for owner in part.owners],
        [part.texts[row] for part in parts for row in part.text_rows],
        uses=[use for part in parts for use in part.uses],
    )
    which = iter(text.text_rows)
    noisy = [
        DenoiserRows(
            part.owners,
            list(islice(which, len(part.owners))),
            kept.latents.flatten(0, 1)[list(part.latent_rows)],
            kept.sigmas.flatten()[list(part.latent_rows)],
            kept.schedule,
            part.conditions,
        )
        for part, kept in zip(parts, kept_by, strict=False)  # empty without a denoiser
    ]
    return ComfySamples(
        text, tokenize(text.text_owners, text.texts), drawn.effective_samples(text), noisy
    )
