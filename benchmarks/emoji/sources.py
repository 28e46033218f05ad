"""The artists' drawings: fetched from npm, rendered once into a cache outside of the repository."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import tarfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

log = logging.getLogger(__name__)
SIDE = 96
"""Pixels of a rendered drawing; no drawing is shown larger than 64, most are shown at 28 to 56."""


@lru_cache(maxsize=1)
def world() -> dict[str, Any]:
    """What world.json says."""
    return json.loads(Path(__file__).with_name("world.json").read_text(encoding="utf-8"))


def icons(cache: Path, artist: str) -> dict[str, Any]:
    """The icons.json of the artist's package, which npm fetches where it is not in `cache`."""
    entry = world()["artists"][artist]
    folder = cache / f"{artist}-{entry['version']}"
    path = folder / "package" / "icons.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"{entry['package']}@{entry['version']}"]
        packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
        archive = folder / packed.stdout.split()[-1]
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        archive.unlink()
    return json.loads(path.read_text(encoding="utf-8"))


def svg_of(collection: Mapping[str, Any], name: str) -> str:
    """The drawing as a whole SVG; an alias stands for its parent.

    Raises KeyError where the artist did not draw it.
    """
    while name in collection.get("aliases", {}):
        name = collection["aliases"][name]["parent"]
    icon = {"width": 16, "height": 16, "left": 0, "top": 0, **collection}
    icon |= collection["icons"][name]
    box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>'


def render(svg: str, side: int = SIDE) -> Image.Image:
    """The drawing as RGBA: what is not transparent of it, grown to `side` on its longer side."""
    import resvg_py

    rough = _rendered(resvg_py, svg, 2 * side)
    box = rough.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise ValueError("the drawing is empty")
    cut = rough.crop(box)
    scale = side / max(cut.size)
    size = (max(1, round(cut.width * scale)), max(1, round(cut.height * scale)))
    # Colours times alpha, as what is under a transparent pixel must not shine through an edge.
    cut = cut.convert("RGBa").resize(size, Image.Resampling.BOX).convert("RGBA")
    square = Image.new("RGBA", (side, side))
    square.paste(cut, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square


def _rendered(resvg_py: Any, svg: str, side: int) -> Image.Image:
    data = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side))
    return Image.open(io.BytesIO(data)).convert("RGBA")


def drawings(cache: Path) -> dict[str, list[Image.Image]]:
    """Every name, and its drawing by each artist in world.json's order; rendered once."""
    names = {**world()["names"], **world()["held_out"]}
    artists = list(world()["artists"])
    path = cache / f"drawings-{SIDE}.npz"
    if path.exists():
        with np.load(path) as kept:
            if list(kept["names"]) == list(names):
                pixels = kept["pixels"]
                return {
                    name: [Image.fromarray(p, "RGBA") for p in pixels[i]]
                    for i, name in enumerate(names)
                }
    collections = {artist: icons(cache, artist) for artist in artists}
    found: dict[str, list[Image.Image]] = {}
    for name, keys in names.items():
        found[name] = [
            render(svg_of(collections[artist], key_of(artist, name, keys))) for artist in artists
        ]
    pixels = np.stack([np.stack([np.asarray(p) for p in row]) for row in found.values()])
    partial = path.with_suffix(".part.npz")
    np.savez_compressed(partial, names=np.array(list(names)), pixels=pixels)
    partial.replace(path)
    log.info("rendered %d names by %d artists", len(names), len(artists))
    return found


def key_of(artist: str, name: str, keys: Mapping[str, str]) -> str:
    """The artist's name of the drawing: what `keys` says for it or for all, or the caption's."""
    usual = keys.get("name", name.replace(" ", "-"))
    if artist == "fxemoji":
        return keys.get("fxemoji", usual.replace("-", ""))
    return keys.get(artist, usual)
