"""The world's things, backgrounds and captions."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from captions import with_article

SIZE = 64
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "gray": (150, 150, 155),
    "black": (25, 25, 28),
    "blue": (55, 105, 215),
    "green": (60, 165, 85),
    "yellow": (250, 220, 90),
    "pink": (245, 165, 200),
    "red": (205, 45, 50),
}
PLURALS = frozenset({"cherries", "grapes", "french fries", "glasses", "jeans", "scissors"})
PLURALS |= {"dice", "thumbs up"}


@lru_cache(maxsize=1)
def world() -> dict[str, Any]:
    """What world.json says."""
    return json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))


def article(words: str) -> str:
    """The words with "a" or "an", or as they are where they are many."""
    return words if words in PLURALS else with_article(words)
