"""Measures of merged LoRAs beside a mean likeness: collapse rate, and share of each LoRA alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

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
