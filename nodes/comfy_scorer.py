"""Scorers whose models ComfyUI moves to the GPU for scoring, and off again when it needs memory;
and the open_clip architectures to choose from. A shared graph must not trigger a download.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..iteris_core.errors import IterisError
from ..iteris_core.score import ClipScorer, ImageScorer
from .comfy_internals import comfy, memory
from .pictures import to_image


class ComfyScorer(ClipScorer):
    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, **options: Any) -> None:
        offload = memory.text_encoder_offload_device()
        super().__init__(model, preprocess, tokenizer, **{**options, "device": offload})
        self._patcher = comfy.model_patcher.ModelPatcher(
            self._model, load_device=memory.get_torch_device(), offload_device=offload
        )

    def _units(self, items: Sequence[Any], embed: Callable[[list[Any]], Tensor]) -> Tensor:
        # open_clip's layers do not move their own weights.
        memory.load_models_gpu([self._patcher], force_full_load=True)
        self._device = self._patcher.load_device
        return super()._units(items, embed)


class ComfyVisionScorer(ImageScorer):
    """Cosines between image embeddings of a CLIP_VISION from ComfyUI's own loader: DINOv2's class
    token, or CLIP's and SigLIP's embedding. It cannot score text."""

    def __init__(self, vision: Any) -> None:
        self._vision, self._batch = vision, 16

    def _embed_images(self, images: list[Image.Image]) -> Tensor:
        # Images may differ in size; a batch may not.
        parts = [self._vision.encode_image(to_image([image]))["image_embeds"] for image in images]
        return torch.cat(parts)

    def text_alignment(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        raise IterisError(
            "A vision model such as DINOv2 cannot read text; for text alignment connect the "
            "scorer from CLIP Scorer Loader."
        )


ARCHITECTURES = (
    *("ViT-L-14-quickgelu", "ViT-L-14", "ViT-L-14-336-quickgelu", "ViT-B-32-quickgelu", "ViT-B-32"),
    *("ViT-B-16-quickgelu", "ViT-B-16", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"),
)
"""Those of open_clip that need only weights, the paper's first."""


def check_open_clip() -> None:
    """Raise :class:`IterisError` if open_clip is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        raise IterisError(
            "CLIP scores need the package open_clip. Install it into ComfyUI's Python (pip install "
            "open_clip_torch), or score with IterIS Vision Scorer. Merges need neither."
        )
