"""The worlds on which merges are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

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


WORLDS: Mapping[str, Callable[[], World]] = {
    "toybox": toybox,
    "reported": reported,
    "twenty": twenty,
    "emoji": emoji,
    "styles": styles,
}
