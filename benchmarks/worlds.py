"""The worlds on which merges are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from protocol.world import World

from iteris_core import IterisError


def toybox() -> World:
    from protocol.toybox import ToyboxWorld

    return ToyboxWorld()


def reported() -> World:
    """Ten concepts on which nothing was chosen (``reported_concepts.py``)."""
    from protocol.toybox import ToyboxWorld

    return ToyboxWorld(Path(__file__).parent / "reported")


def emoji() -> World:
    from protocol.emoji import EmojiWorld

    return EmojiWorld()


def framed() -> World:
    """The reported concepts without the frame of evaluation prompts in any row."""
    from protocol.toybox import PLAINLY

    world = reported()
    world.half, world.words = {"templates": PLAINLY}, world.words | {"background"}
    return world


def minilm() -> World:
    from protocol.minilm import MiniLMWorld

    return MiniLMWorld()


def styles() -> World:
    from protocol.styles import StyleWorld

    return StyleWorld()


WORLDS: Mapping[str, Callable[[], World]] = {
    "toybox": toybox,
    "reported": reported,
    "emoji": emoji,
    "framed": framed,
    "minilm": minilm,
    "styles": styles,
}
HELP = f"{', '.join(WORLDS)}, or a .yaml file of your own (open/README.md)"


def world_of(name: str) -> World:
    """Of a name in :data:`WORLDS`, or of a YAML file. Raises SystemExit with what is wrong."""
    if name in WORLDS:
        return WORLDS[name]()
    if Path(name).suffix not in (".yaml", ".yml"):
        raise SystemExit(f"There is no world {name!r}; give {HELP}.")
    from own_world import OwnWorld

    try:
        return OwnWorld(Path(name))
    except IterisError as error:
        raise SystemExit(str(error)) from error


def sizes_in(world: World, sizes: Sequence[int]) -> list[int]:
    """Those of ``sizes`` that the world has concepts for."""
    known = [size for size in sizes if size <= len(world.subjects)]
    if not known:
        raise SystemExit(f"The world has {len(world.subjects)} concepts; give smaller --sizes.")
    return known
