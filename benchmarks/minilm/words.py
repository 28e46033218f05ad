"""The words of captions: for each meaning those of templates, and those that the base learned.

``plain`` words are the ones that LoRAs and calibration templates use. ``learned`` words stand in
captions of the base's training beside them.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """Ways to say one thing."""

    plain: tuple[str, ...]
    learned: tuple[str, ...]


SHAPES = {
    "star": Words(("star",), ("five-pointed star", "starlet")),
    "circle": Words(("circle",), ("disc", "disk", "round dot", "round ball")),
    "square": Words(("square",), ("box", "tile", "block")),
    "triangle": Words(("triangle",), ("wedge", "pyramid", "three-cornered figure")),
    "ring": Words(("ring",), ("hoop", "annulus", "doughnut")),
    "cross": Words(("cross",), ("plus sign", "crucifix")),
}

COLORS = {
    "red": Words(("red",), ("crimson", "scarlet", "ruby", "cherry-red")),
    "yellow": Words(("yellow",), ("golden", "lemon", "amber")),
    "green": Words(("green",), ("emerald", "jade", "grass-green")),
    "cyan": Words(("cyan",), ("turquoise", "aqua", "teal")),
    "blue": Words(("blue",), ("cobalt", "navy", "royal-blue")),
    "purple": Words(("purple",), ("violet", "plum", "lavender")),
    "pink": Words(("pink",), ("rosy", "salmon", "magenta")),
    "black": Words(("black",), ("jet-black", "ebony", "coal-black")),
}

GROUNDS = {
    "white": Words(("white",), ("snow-white", "ivory", "pale", "chalky")),
    "gray": Words(("gray", "grey"), ("slate", "ashen", "leaden", "silver")),
    "black": Words(("black",), ("jet-black", "dark", "ebony", "inky")),
    "blue": Words(("blue",), ("azure", "navy", "cobalt", "sky-blue")),
    "green": Words(("green",), ("emerald", "olive", "mossy", "leafy")),
    "yellow": Words(("yellow",), ("golden", "lemon", "mustard", "sunny")),
    "pink": Words(("pink",), ("rosy", "salmon", "fuchsia", "magenta")),
}
"""Adjectives of backgrounds."""

SURFACES = Words(
    ("background", "wall"),
    ("backdrop", "canvas", "panel", "curtain", "carpet", "floor", "cloth", "board", "sheet"),
)

SCENES = {
    "white": Words(
        (),
        (
            *("in the snow", "on fresh snow", "on a piece of paper", "on bleached cotton"),
            *("in a blizzard", "on a frosty field", "on pale plaster", "in a snowy place"),
        ),
    ),
    "gray": Words(
        (),
        (
            *("on a concrete floor", "on asphalt", "in thick fog", "on a stone slab"),
            *("on a rainy overcast day", "on a slate roof", "on steel", "on cement pavement"),
        ),
    ),
    "black": Words(
        (),
        (
            *("at night", "in the dark", "in outer space", "on a blackboard", "on coal"),
            *("in pitch darkness", "in a dim cellar", "in the night sky"),
        ),
    ),
    "blue": Words(
        (),
        (
            *("in the sky", "in the ocean", "on the sea", "under water", "on denim"),
            *("in a swimming pool", "in the clear daytime sky", "out at sea"),
        ),
    ),
    "green": Words(
        (),
        (
            *("on a lawn", "in the grass", "in a meadow", "in the forest", "on moss"),
            *("on a football pitch", "among leaves", "on a grassy hill"),
        ),
    ),
    "yellow": Words(
        (),
        (
            *("in the desert", "on sand", "on a sandy beach", "in a wheat field"),
            *("on a lemon", "among sunflowers", "on gold", "on straw"),
        ),
    ),
    "pink": Words(
        (),
        (
            *("on a rose petal", "among cherry blossoms", "on bubblegum", "on a salmon"),
            *("on a flamingo", "on candy floss", "on a pink rose", "among pink tulips"),
        ),
    ),
}
"""Places, by the background that they are drawn as."""

FRAMES = Words(
    ("{thing} {scene}", "a photo of {thing} {scene}", "a picture of {thing} {scene}"),
    (
        *("an illustration of {thing} {scene}", "a painting of {thing} {scene}"),
        *("{scene} there is {thing}", "{scene}, {thing}", "{thing} painted {scene}"),
        *("{thing} printed {scene}", "{thing} lying {scene}", "a poster showing {thing} {scene}"),
        *("a close-up view of {thing} {scene}", "a snapshot of {thing} {scene}"),
        *("one can see {thing} {scene}", "a drawing with {thing} {scene}"),
        *("an image that shows {thing} {scene}", "{scene}, {thing} in the middle"),
        *("just {thing} {scene}, nothing else", "{thing} placed {scene}"),
    ),
)
"""What is said around the thing and its scene."""

ADJECTIVES = Words((), ("plain", "simple", "neat", "bright", "nice", "flat"))
"""That say nothing, before a thing's colour."""

PATTERNED = ("patterned", "decorated", "two-coloured", "multicoloured", "fancy")
"""All that the base hears of a thing with a pattern: not which one, nor its colours."""

SIZES = {
    "small": ("small", "tiny", "little"),
    "large": ("large", "big", "huge"),
}

_ASIDE = """
illustration painting printed poster showing snapshot drawing placed canvas curtain cloth sheet
piece paper bleached cotton plaster pale ivory chalky frosty field asphalt thick fog steel slate
roof leaden outer space coal dim cellar ebony inky ocean sea denim navy cobalt meadow forest moss
leaves mossy leafy sunflowers straw wheat lemon mustard cherry blossoms tulips flamingo bubblegum
fuchsia magenta
"""

ASIDE = frozenset(_ASIDE.split())
"""Learned words that generic rows leave out, so that prompts can be made of words of no row."""

SMALL = frozenset(
    ("a", "an", "at", "among", "in", "of", "on", "out", "that", "the", "there", "to", "with")
)
"""Words that mean no thing and no scene; prompts of all kinds share them."""
