"""Scores of images, and their presentation."""

from .scorers import ClipScorer, DinoScorer, ImageScorer, clip_score, without_tokens

__all__ = ["ClipScorer", "DinoScorer", "ImageScorer", "clip_score", "without_tokens"]
