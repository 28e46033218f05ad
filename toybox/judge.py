"""The judge: a small CNN that reads an image's attributes, independent of CLIP and of the base.

Halves of two-object images are cut out and widened to a square with their own edge pixels, as in
the judge's training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from .draw import BACKGROUNDS, COLORS, PATTERNS, SHAPES, SIZE, Thing

HEADS: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "pattern": PATTERNS,
    "color1": tuple(COLORS),
    "color2": (*COLORS, "none"),
    "background": tuple(BACKGROUNDS),
}


@dataclass(frozen=True)
class Attributes:
    """What the judge sees; `color2` is 'none' for a plain thing."""

    shape: str
    pattern: str
    color1: str
    color2: str
    background: str

    def matches(self, thing: Thing) -> tuple[bool, bool, bool, bool]:
        """Whether shape, pattern, main and second colour are `thing`'s."""
        return (
            self.shape == thing.shape,
            self.pattern == thing.pattern,
            self.color1 == thing.color1,
            self.color2 == thing.color2,
        )


class JudgeNet(nn.Module):
    """(N, 3, 64, 64) in [-1, 1] to one vector of logits for each head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        sizes = ((3, 32, 2), (32, 48, 2), (48, 64, 1), (64, 96, 2), (96, 96, 1))
        for inner, outer, stride in sizes:
            layers += [nn.Conv2d(inner, outer, 3, stride, 1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.mix = nn.Sequential(nn.Linear(192, 160), nn.SiLU())
        self.heads = nn.ModuleDict({k: nn.Linear(160, len(v)) for k, v in HEADS.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.body(pictures)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        mixed = self.mix(pooled)
        return {name: head(mixed) for name, head in self.heads.items()}


class Judge:
    """Reads pictures."""

    def __init__(self, network: JudgeNet):
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image]) -> list[Attributes]:
        """The attributes of each picture's one thing."""
        found: list[Attributes] = []
        for first in range(0, len(images), 128):
            arrays = np.stack([_as_array(i) for i in images[first : first + 128]])
            batch = torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
            logits = self.network(batch)
            best = {k: v.argmax(dim=1).tolist() for k, v in logits.items()}
            found += [
                Attributes(**{k: HEADS[k][best[k][i]] for k in HEADS}) for i in range(len(arrays))
            ]
        return found

    def read_halves(self, images: Sequence[Image.Image]) -> list[tuple[Attributes, Attributes]]:
        """(left, right) of each picture with two things side by side."""
        read = self.read([half for image in images for half in halves(image)])
        return list(zip(read[0::2], read[1::2], strict=True))


def halves(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The left and right half, each widened to a square by repeating its edge pixels."""
    array = _as_array(image)
    cut = (array[:, : SIZE // 2], array[:, SIZE // 2 :])
    wide = [np.pad(c, ((0, 0), (SIZE // 4, SIZE // 4), (0, 0)), mode="edge") for c in cut]
    return Image.fromarray(wide[0]), Image.fromarray(wide[1])


def _as_array(image: Image.Image) -> np.ndarray:
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.array(image)


def load(folder: Path) -> Judge:
    """The judge saved in `folder`."""
    network = JudgeNet()
    network.load_state_dict(
        {k: v.float() for k, v in load_file(folder / "judge.safetensors").items()}
    )
    return Judge(network)
