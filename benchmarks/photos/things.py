"""Cut-out photographs with captions, from Debian's package ``tuxpaint-stamps-default``.

The package is GPL-2: nothing of it lies in this repository. :func:`cutouts` reads a folder into
which ``apt-get download tuxpaint-stamps-default`` and ``dpkg-deb -x`` have put it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from captions import with_article
from PIL import Image

from toybox.draw import BACKGROUNDS

ROOT = Path(__file__).resolve().parent
SIZE = 64
STAMPS = "usr/share/tuxpaint/stamps"
HELD_OUT = {"bird": 6, "fruit": 5, "flower": 4, "hat": 4, "car": 3, "cat": 2}
"""Kind → how many of it are held out as things to learn; a permutation by SEED names them."""
SEED = 2026
TOKENS = (
    "sks", "zwx", "ohwx", "qzv", "vbx", "kzq", "tqw", "xqj", "pfz", "gwk", "hjv", "bqd",
    "wvk", "jqx", "zpf", "mxk", "rbv", "dwq", "fzk", "nqj", "ckv", "lwz", "yxp", "tgj",
)  # fmt: skip
KINDS = {
    "animals/birds": "bird", "animals/fish": "fish", "animals/insects": "insect",
    "animals/lizards": "lizard", "animals/amphibians": "frog", "animals/shellfish": "shell",
    "animals/mammals/apes": "ape", "animals/mammals/aquatic": "animal",
    "animals/mammals/bears": "bear", "animals/mammals/bovines": "animal",
    "animals/mammals/camel": "camel", "animals/mammals/cats": "cat",
    "animals/mammals/deer": "deer", "animals/mammals/dogs": "dog",
    "animals/mammals/equines": "horse", "animals/mammals/lagomorphs": "rabbit",
    "animals/mammals/rodents": "rodent", "animals/mammals": "animal",
    "animals/marsupials": "animal", "food/fruit": "fruit", "food/nuts": "nut",
    "food/vegetables": "vegetable", "plants/flowers": "flower", "plants/mushrooms": "mushroom",
    "plants/trees": "tree", "vehicles/auto": "car", "vehicles/race": "car",
    "vehicles/emergency": "truck", "vehicles/construction": "truck",
    "vehicles/masstransit": "bus", "vehicles/ship": "boat", "vehicles/flight/planes": "plane",
    "clothes/hats": "hat", "hobbies/music/string": "guitar", "household/tools": "tool",
    "household/dishes": "dish", "household/dishes/utensils": "dish",
    "household/arttools": "pen", "household/electronics": "device", "sports": "ball",
}  # fmt: skip
"""Folder of the package → the kind of what it has."""

_RENAMED = {
    "eat your broccoli": "broccoli", "it's a cep": "cep mushroom", "cep": "cep mushroom",
    "very poisonous lionfish": "lionfish", "ripe": "tomato", "alien tree": "rambutan tree",
    "sweet yellow corn": "corn cob", "male black rhino": "rhino", "measuring tape": "tape measure",
    "denium": "desert rose", "george the blue groper": "blue groper",
}  # fmt: skip
_MANY = frozenset({"cherries", "grapes", "scissors", "pliers", "two flowers", "some flowers"})
_LEAST, _LONGEST = 44, 4.2
"""Pixels of a cut-out's longer side, and how many times its shorter side that may be."""


@lru_cache(maxsize=1)
def world() -> dict[str, Any]:
    """What world.json says."""
    return json.loads((ROOT / "world.json").read_text(encoding="utf-8"))


def article(words: str) -> str:
    """The words with "a" or "an", or as they are where they are many."""
    return words if words in _MANY or words.startswith("two ") else with_article(words)


def listed(package: Path) -> Iterator[tuple[str, str, str]]:
    """(file, name, kind) of each usable cut-out: one with a short caption."""
    root = package / STAMPS
    for path in sorted(root.rglob("*.png")):
        file, text = path.relative_to(root), path.with_suffix(".txt")
        kind = KINDS.get(str(file.parent))
        if kind is None or "_mirror" in path.stem or not text.exists():
            continue
        first = text.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        words = re.split(r"[.!?(,;:]", first)[0].strip().lower()
        words = re.sub(r"^(an?|the) ", "", re.sub('[“”"]', "", words))
        words = re.sub(r"^(pair|bunch|head|string) of (open |closed )?", "", words)
        words = _RENAMED.get(words, words)
        if 0 < len(words.split()) <= 3 and _usable(path):
            yield str(file), words, kind


def _usable(path: Path) -> bool:
    cut = _trimmed(path)
    opaque = np.asarray(cut.getchannel("A")) > 20
    long, short = max(cut.size), min(cut.size)
    return long >= _LEAST and long <= _LONGEST * short and opaque.mean() < 0.98


def _trimmed(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA")
    return picture.crop(picture.getchannel("A").point(lambda v: 255 * (v > 20)).getbbox())


def split(things: list[tuple[str, str, str]]) -> tuple[list[Any], list[Any]]:
    """What the base learns, and (token, file, name, kind) of what is held out of it."""
    rng, held = np.random.default_rng(SEED), list[tuple[str, str, str]]()
    for kind, count in HELD_OUT.items():
        of = [thing for thing in things if thing[2] == kind]
        held += [of[i] for i in rng.permutation(len(of))[:count]]
    order = rng.permutation(len(held))
    return (
        [thing for thing in things if thing not in held],
        [(token, *held[i]) for token, i in zip(TOKENS, order, strict=True)],
    )


def cutouts(package: Path) -> dict[str, Image.Image]:
    """File → its cut-out, at most 96 pixels long."""
    found: dict[str, Image.Image] = {}
    for file in [t[0] for t in world()["things"]] + [h[1] for h in world()["held_out"]]:
        cut = _trimmed(package / STAMPS / file)
        cut.thumbnail((96, 96), Image.Resampling.LANCZOS)
        found[file] = cut
    return found


def picture(cut: Image.Image, background: str, rng: np.random.Generator) -> Image.Image:
    """The cut-out, turned, mirrored, lit and moved at random, on a textured ground of that colour;
    64 by 64."""
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cut = cut.rotate(float(rng.uniform(-10, 10)), Image.Resampling.BICUBIC, expand=True)
    scale = float(rng.uniform(46, 60)) / max(cut.size)
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    cut = cut.resize(size, Image.Resampling.LANCZOS)
    light = np.asarray(cut.convert("RGB"), dtype=float) * rng.uniform(0.88, 1.12)
    alpha = np.asarray(cut.getchannel("A"), dtype=float)[..., None] / 255
    ground = _ground(background, rng)
    x, y = ((SIZE - s) // 2 + int(rng.integers(-3, 4)) for s in size)
    x, y = (min(max(v, 0), SIZE - s) for v, s in ((x, size[0]), (y, size[1])))
    part = ground[y : y + size[1], x : x + size[0]]
    part[:] = part * (1 - alpha) + light * alpha
    return Image.fromarray(ground.clip(0, 255).astype(np.uint8))


def references(cut: Image.Image, number: int, count: int = 14) -> list[Image.Image]:
    """Pictures of the held-out thing ``number``, from none of which a LoRA learns; the first 14 are
    those that likeness is to."""
    rng, grounds = np.random.default_rng(9_000 + number), cycle(BACKGROUNDS)
    return [picture(cut, ground, rng) for ground in islice(grounds, count)]


def _ground(background: str, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """(64, 64, 3): the colour, brighter to one side, with soft spots or grain."""
    along = np.linspace(-1, 1, SIZE)
    angle = rng.uniform(0, 2 * np.pi)
    slope = np.cos(angle) * along[None] + np.sin(angle) * along[:, None]
    cells = int(rng.choice([4, 8, 32]))
    grain = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
    spots = np.asarray(grain.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    shade = rng.uniform(0, 14) * slope + rng.uniform(0, 7) * spots
    return np.array(BACKGROUNDS[background], dtype=float) + shade[..., None] + rng.normal(0, 3, 3)
