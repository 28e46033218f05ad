"""What the field says of merged LoRAs beside a mean likeness: collapse, shares, harmonic means."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, harmonic_mean

from ..errors import ScoreError


def collapse_rate(likeness: Sequence[float], below: float) -> float:
    """SCR@τ: the share of subjects whose likeness to their references is under ``below``.

    A mean hides that one concept of several is lost; this counts the lost ones. Each value is one
    subject in one picture, and one that was not found in its picture counts as lost by likeness 0.
    """
    if not likeness:
        raise ScoreError("A collapse rate needs at least one subject's likeness.")
    return fmean(value < below for value in likeness)


def share_of_alone(merged: float, alone: float) -> float:
    """The likeness that a merge reaches as a share of what each LoRA reaches alone."""
    if not alone > 0:
        raise ScoreError(f"A share needs a likeness of the LoRAs alone above 0, not {alone}.")
    return merged / alone


def likeness_kept(merged: float, alone: float, base: float) -> float:
    """The same share above what the base model draws without any LoRA; negative below it."""
    if not alone > base:
        raise ScoreError(
            f"The LoRAs alone are no more like their references ({alone:.3f}) than the base model "
            f"is ({base:.3f}), so that there is nothing to keep."
        )
    return (merged - base) / (alone - base)


def harmonic_score(scores: Sequence[float]) -> float:
    """S_harm: the harmonic mean of a picture's scores, of its subject and of its style.

    The least of them decides, so that giving up the style for the subject does not pay. A negative
    cosine counts as 0.
    """
    if not scores:
        raise ScoreError("A harmonic mean needs at least one score.")
    return harmonic_mean([max(score, 0.0) for score in scores])


def several_in_one(
    pictures: Sequence[Sequence[float | None]],
) -> tuple[float, float]:
    """(mean likeness, success rate) of pictures that should show several subjects.

    Each picture has one likeness for each subject, of the crop that shows it; None is a subject
    that was not found, and counts 0. A success is a picture in which every subject was found.
    """
    if not pictures or not all(pictures):
        raise ScoreError("Several subjects in one picture need pictures with subjects.")
    values = [value or 0.0 for picture in pictures for value in picture]
    return fmean(values), fmean(all(v is not None for v in picture) for picture in pictures)
