"""Reads which look a picture has, and what it showed before it had that look.

A network reads what is to be seen: the kind of look, and the thing with the colours that it has.
Some looks only exchange colours: a red star on yellow may be plain, or the negative of a cyan star
on blue. Of such a picture the look is the exchange that leads from the background that its prompt
requests to the one that it has, and that exchange is undone in the colours of the thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from toybox.draw import BACKGROUNDS, COLORS, Thing
from toybox.judge import HEADS, JudgeNet

from . import LOOKS, PLAIN

PALETTE = {**COLORS, **BACKGROUNDS}

_ACROSS = {"red": "cyan", "yellow": "blue", "green": "pink", "purple": "gray", "black": "white"}
_WHEEL = ("red", "yellow", "green", "cyan", "blue", "purple", "pink")

SWAPS: Mapping[str, Mapping[str, str]] = {
    "negative": {**_ACROSS, **{to: of for of, to in _ACROSS.items()}},
    "palette": {
        **dict(zip(_WHEEL, (*_WHEEL[1:], _WHEEL[0]), strict=True)),
        **{"white": "gray", "gray": "black", "black": "white"},
    },
}
"""Looks that only exchange colours, each for another one."""

STYLES = (PLAIN, *LOOKS)
KINDS = (PLAIN, *(name for name in LOOKS if name not in SWAPS))
"""Of looks, as a network can tell them apart: an exchange of colours is as plain as none."""
READ: dict[str, tuple[str, ...]] = {
    "kind": KINDS,
    "shape": HEADS["shape"],
    "pattern": HEADS["pattern"],
    "color1": tuple(PALETTE),
    "color2": (*PALETTE, "none"),
}
ATTRIBUTES = ("shape", "pattern", "color1", "color2")


@dataclass(frozen=True)
class Styled:
    """A picture's look, ``unknown`` for an exchange of colours that is none of the looks; and its
    thing as it would be without the look."""

    style: str
    shape: str
    pattern: str
    color1: str
    color2: str

    def matches(self, thing: Thing) -> dict[str, bool]:
        """Attribute → whether it is ``thing``'s."""
        return {name: getattr(self, name) == getattr(thing, name) for name in ATTRIBUTES}


class ReaderNet(nn.Module):
    """(N, 3, 64, 64) in [-1, 1] to logits of each head; the toybox's judge with other heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = JudgeNet().body
        self.mix = nn.Sequential(nn.Linear(192, 192), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(192, len(of)) for name, of in READ.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.body(pictures)
        mixed = self.mix(torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1))
        return {name: head(mixed) for name, head in self.heads.items()}


class Reader:
    def __init__(self, network: ReaderNet) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image], scenes: Sequence[str]) -> list[Styled]:
        """What each picture shows, whose prompt requests the background of its place."""
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        batch = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        best = {name: values.argmax(dim=1).tolist() for name, values in self.network(batch).items()}
        return [
            _without_look(image, scene, {name: READ[name][best[name][i]] for name in READ})
            for i, (image, scene) in enumerate(zip(images, scenes, strict=True))
        ]


def _without_look(image: Image.Image, scene: str, seen: dict[str, str]) -> Styled:
    kind = seen.pop("kind")
    if kind != PLAIN:
        return Styled(kind, **seen)
    shown = ground(image)
    if shown == scene:
        return Styled(PLAIN, **seen)
    style = next((name for name, swaps in SWAPS.items() if swaps[scene] == shown), "unknown")
    back = {to: of for of, to in SWAPS.get(style, {}).items()}
    return Styled(style, **{name: back.get(value, value) for name, value in seen.items()})


def ground(picture: Image.Image) -> str:
    """The colour of :data:`PALETTE` that is nearest to that of the outermost two pixels."""
    values = np.asarray(picture.convert("RGB"), dtype=float)
    outer = np.ones(values.shape[:2], dtype=bool)
    outer[2:-2, 2:-2] = False
    colours = np.array(list(PALETTE.values()), dtype=float)
    away = np.linalg.norm(colours - np.median(values[outer], axis=0), axis=1)
    return list(PALETTE)[int(away.argmin())]


def load(folder: Path) -> Reader:
    network = ReaderNet()
    tensors = load_file(folder / "reader.safetensors")
    network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return Reader(network)
