"""Scores of pictures: CLIP image and text alignment."""

from .clip import ClipScorer, clip_score, without_tokens

__all__ = ["ClipScorer", "clip_score", "without_tokens"]
