"""How merged files are used, drawn for a share of the rows: other strengths, another LoRA beside.

A merge is fitted to what its rows show. With all of them at strength 1 and nothing beside, five
LoRAs break at strength 1.2 or beside a sixth (docs/decisions.md, "A change is bounded, and rows
stand for other uses").
"""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from ..activations.conditions import PLAIN, Condition
from ..concepts import Calibration

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


def drawn_uses(
    samples: Sequence[Hashable], loras: Sequence[int], calibration: Calibration
) -> list[Use]:
    """The use of every row: plain, but for a share of the rows, spread over each sample's steps.
    Those of one sample, which ``samples`` names by row, have one use. ``loras`` are the concepts of
    which phantoms can be made."""
    draw = random.Random(calibration.seed)
    known: dict[Hashable, Use] = {}
    uses: list[Use] = []
    for row, sample in enumerate(samples):
        if row * _GOLDEN % 1 >= (calibration.conditions or 0.0):
            uses.append(Use())
            continue
        if sample not in known:
            known[sample] = _drawn(draw, loras)
        uses.append(known[sample])
    return uses


def _drawn(draw: random.Random, loras: Sequence[int]) -> Use:
    text = denoiser = 1.0
    if draw.random() < _AT_STRENGTHS:  # of both together, or of the text encoders apart
        text = denoiser = draw.uniform(*_STRENGTHS)
        apart = draw.random()
        if apart < 0.5:
            text = draw.uniform(*_STRENGTHS)
        if apart < 0.25:
            denoiser = 1.0
    if draw.random() >= _BESIDE_ANOTHER:
        return Use(Condition(text), Condition(denoiser))
    phantom = draw.choice(loras), draw.uniform(*_BESIDE), draw.randrange(1 << 32)
    return Use(Condition(text, *phantom), Condition(denoiser, *phantom))
