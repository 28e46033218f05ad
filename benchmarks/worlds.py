"""The worlds on which merges are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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


def twenty() -> World:
    from protocol.toybox import ToyboxWorld
    from twenty_concepts import ROOT

    return ToyboxWorld(ROOT)


def other(kind: str) -> World:
    """Six of the reported ten with LoRAs of another rank or trainer."""
    from other_loras import root_of
    from protocol.toybox import ToyboxWorld

    return ToyboxWorld(root_of(kind))


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
    **{kind: partial(other, kind) for kind in ("rank_2", "rank_64", "kohya")},
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
