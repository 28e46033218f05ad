"""The worlds on which merges are measured, and the rivals' settings that go with each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from outputs import RESULTS
from protocol.settings import ON_TWO_PAIRS, Chosen
from protocol.world import World


def toybox() -> World:
    from protocol.toybox import ToyboxWorld

    return ToyboxWorld()


def reported() -> World:
    """Ten concepts on which nothing was chosen (``reported_concepts.py``)."""
    from protocol.toybox import ToyboxWorld

    return ToyboxWorld(Path(__file__).parent / "reported")


def twenty() -> World:
    from protocol.toybox import ToyboxWorld
    from twenty_concepts import ROOT

    return ToyboxWorld(ROOT)


def emoji() -> World:
    from protocol.emoji import EmojiWorld

    return EmojiWorld()


def styles() -> World:
    from protocol.styles import StyleWorld

    return StyleWorld()


WORLDS: Mapping[str, tuple[Callable[[], World], str]] = {
    "toybox": (toybox, "reported"),
    "reported": (reported, "reported"),
    "twenty": (twenty, "reported"),
    "emoji": (emoji, "emoji"),
    "styles": (styles, "reported"),
}
"""World → how it is loaded, and whose search has settings for it"""


def settings_of(search: str) -> Chosen:
    """What a search found, for methods marked ``@searched``."""
    return Chosen(RESULTS / f"{search}_settings.json", ON_TWO_PAIRS)
