"""The words of captions: for each meaning those of templates, those that the base learned, and
those that no caption of the training has.

``PLAIN`` words are the ones that LoRAs and calibration templates use. ``LEARNED`` words stand in
captions of the base's training beside them, ``UNHEARD`` ones in nothing: their meaning is known by
the pretrained encoder alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Words(NamedTuple):
    """Ways to say one thing."""

    plain: tuple[str, ...]
    learned: tuple[str, ...]
    unheard: tuple[str, ...]


SHAPES = {
    "star": Words(("star",), ("five-pointed star", "starlet"), ("pentagram", "starfish")),
    "circle": Words(("circle",), ("disc", "disk", "round dot", "round ball"), ("orb", "coin")),
    "square": Words(("square",), ("box", "tile", "block"), ("cube", "quadrangle")),
    "triangle": Words(("triangle",), ("wedge", "pyramid", "three-cornered figure"), ("cone",)),
    "ring": Words(("ring",), ("hoop", "annulus", "doughnut"), ("bracelet", "tyre")),
    "cross": Words(("cross",), ("plus sign", "crucifix"), ("plus symbol",)),
}

COLORS = {
    "red": Words(("red",), ("crimson", "scarlet", "ruby", "cherry-red"), ("vermilion", "maroon")),
    "yellow": Words(("yellow",), ("golden", "lemon", "amber"), ("canary", "saffron")),
    "green": Words(("green",), ("emerald", "jade", "grass-green"), ("lime", "pistachio")),
    "cyan": Words(("cyan",), ("turquoise", "aqua", "teal"), ("aquamarine",)),
    "blue": Words(("blue",), ("cobalt", "navy", "royal-blue"), ("sapphire", "ultramarine")),
    "purple": Words(("purple",), ("violet", "plum", "lavender"), ("mauve", "aubergine")),
    "pink": Words(("pink",), ("rosy", "salmon", "magenta"), ("coral", "blush")),
    "black": Words(("black",), ("jet-black", "ebony", "coal-black"), ("sable", "raven")),
}

GROUNDS = {
    "white": Words(("white",), ("snow-white", "ivory", "pale", "chalky"), ("alabaster", "milky")),
    "gray": Words(("gray", "grey"), ("slate", "ashen", "leaden", "silver"), ("pewter", "smoky")),
    "black": Words(("black",), ("jet-black", "dark", "ebony", "inky"), ("sable", "raven")),
    "blue": Words(("blue",), ("azure", "navy", "cobalt", "sky-blue"), ("sapphire", "ultramarine")),
    "green": Words(("green",), ("emerald", "olive", "mossy", "leafy"), ("fern", "pistachio")),
    "yellow": Words(("yellow",), ("golden", "lemon", "mustard", "sunny"), ("canary", "saffron")),
    "pink": Words(("pink",), ("rosy", "salmon", "fuchsia", "magenta"), ("coral", "blush")),
}
"""Adjectives of backgrounds."""

SURFACES = Words(
    ("background", "wall"),
    ("backdrop", "canvas", "panel", "curtain", "carpet", "floor", "cloth", "board", "sheet"),
    ("tarpaulin", "ceiling", "blanket", "mat"),
)

SCENES = {
    "white": Words(
        (),
        (
            *("in the snow", "on fresh snow", "on a piece of paper", "on bleached cotton"),
            *("in a blizzard", "on a frosty field", "on pale plaster", "in a snowy place"),
        ),
        ("on a glacier", "in a bowl of milk", "on a wedding dress", "on a porcelain plate"),
    ),
    "gray": Words(
        (),
        (
            *("on a concrete floor", "on asphalt", "in thick fog", "on a stone slab"),
            *("on a rainy overcast day", "on a slate roof", "on steel", "on cement pavement"),
        ),
        ("on an elephant", "on a rock", "on cobblestones", "on an aluminium lid"),
    ),
    "black": Words(
        (),
        (
            *("at night", "in the dark", "in outer space", "on a blackboard", "on coal"),
            *("in pitch darkness", "in a dim cellar", "in the night sky"),
        ),
        ("in a cave", "at midnight", "in an unlit tunnel", "on charcoal"),
    ),
    "blue": Words(
        (),
        (
            *("in the sky", "in the ocean", "on the sea", "under water", "on denim"),
            *("in a swimming pool", "in the clear daytime sky", "out at sea"),
        ),
        ("on a lake", "in a lagoon", "on a pair of jeans", "in the deep Atlantic"),
    ),
    "green": Words(
        (),
        (
            *("on a lawn", "in the grass", "in a meadow", "in the forest", "on moss"),
            *("on a football pitch", "among leaves", "on a grassy hill"),
        ),
        ("in the jungle", "on a golf course", "on spinach", "on a pasture"),
    ),
    "yellow": Words(
        (),
        (
            *("in the desert", "on sand", "on a sandy beach", "in a wheat field"),
            *("on a lemon", "among sunflowers", "on gold", "on straw"),
        ),
        ("on a banana", "on dunes", "among daffodils", "on a slice of cheese"),
    ),
    "pink": Words(
        (),
        (
            *("on a rose petal", "among cherry blossoms", "on bubblegum", "on a salmon"),
            *("on a flamingo", "on candy floss", "on a pink rose", "among pink tulips"),
        ),
        ("on a piglet", "among peonies", "on raspberry yoghurt", "on a ballerina"),
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
    (
        *("a sketch of {thing} {scene}", "a mural depicting {thing} {scene}"),
        *("behold {thing} {scene}", "my niece drew {thing} {scene}"),
        *("we noticed {thing} resting {scene}", "{scene} somebody left {thing}"),
    ),
)
"""What is said around the thing and its scene."""

ADJECTIVES = Words((), ("plain", "simple", "neat", "bright", "nice", "flat"), ())
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
