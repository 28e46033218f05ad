"""CIDEr of the caption benchmark against the COCO tools' figures (pycocoevalcap 1.2)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_FILE = Path(__file__).parents[2] / "benchmarks" / "caption_scores.py"
_SPEC = importlib.util.spec_from_file_location("caption_scores", _FILE)
scores = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(scores)

CAPTIONS = [
    "a red star on a white background",
    "a lovely blue circle with yellow stripes",
    "a ring",
    "what a great green square on a black background , well done",
]
REFERENCES = [
    ["a lovely red star on a white background", "a red star on a gray background",
     "such a red star"],
    ["a lovely blue circle with yellow stripes on a pink background",
     "a dull blue circle with a yellow rim"],
    ["a pink ring on a blue background that makes me smile", "a perfect pink ring"],
    ["what a great green square on a black background",
     "a green square on a black background and it shines"],
]  # fmt: skip


def test_scores_are_those_of_the_coco_tools():
    assert scores.cider(CAPTIONS, REFERENCES) == pytest.approx(4.243903064066857)


def test_a_perfect_and_an_empty_caption():
    alike = [[caption] for caption in CAPTIONS[1:]]
    # Of two words there are no threes and fours to share.
    assert scores.cider(CAPTIONS[1:], alike) == pytest.approx((10 + 5 + 10) / 3)
    assert scores.cider(["", "", ""], alike) == 0
