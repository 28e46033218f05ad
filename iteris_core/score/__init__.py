"""Scores of pictures, and what shows them."""

from .clip import ClipScorer, clip_score, without_tokens
from .dino import DinoScorer

__all__ = ["ClipScorer", "DinoScorer", "clip_score", "without_tokens"]
