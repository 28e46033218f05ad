"""The worlds on which merges are measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from protocol.world import World

from iteris_core import IterisError


def _world(module: str, kind: str, *arguments: Any) -> World:
    """Its module is imported only now."""
    return getattr(import_module(f"protocol.{module}"), kind)(*arguments)


toybox = partial(_world, "toybox", "ToyboxWorld")
reported = partial(toybox, Path(__file__).parent / "reported")
"""Ten concepts on which nothing was chosen: a rule chose them before any was trained
(``reported_concepts.py`` at commit cc0405a)."""
gentle = partial(toybox, Path(__file__).parent / "gentle")
"""Three of the toybox's own, trained at an eighth of the rate: their changes are .1 to .2 of the
layers' weights (medians), where the toybox's are .2 to .5."""
photos = partial(_world, "photos", "PhotosWorld")


def photos_small() -> World:
    """Photographs on a base of half the width."""
    from photos import SMALL

    return _world("photos", "PhotosWorld", SMALL)


def framed() -> World:
    """The reported concepts without the frame of evaluation prompts in any row."""
    from protocol.toybox import PLAINLY

    world = reported()
    world.half, world.words = {"templates": PLAINLY}, world.words | {"background"}
    return world


WORLDS: Mapping[str, Callable[[], World]] = {
    "toybox": toybox,
    "gentle": gentle,
    "reported": reported,
    "emoji": partial(_world, "emoji", "EmojiWorld"),
    "framed": framed,
    "pairs": reported,
    "minilm": partial(_world, "minilm", "MiniLMWorld"),
    "photos": photos,
    "photos_class": photos,
    "photos_small": photos_small,
    "styles": partial(_world, "styles", "StyleWorld"),
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
