"""A scorer whose model ComfyUI moves to the GPU when it scores, and away when it needs the room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management as memory
import comfy.model_patcher
from PIL import Image
from torch import Tensor

from ..iteris_core.score import ClipScorer


class ComfyScorer(ClipScorer):
    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, **options: Any) -> None:
        offload = memory.text_encoder_offload_device()
        super().__init__(model, preprocess, tokenizer, **{**options, "device": offload})
        self._patcher = comfy.model_patcher.ModelPatcher(
            self._model, load_device=memory.get_torch_device(), offload_device=offload
        )

    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        self._load()
        return super().embed_images(images)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        self._load()
        return super().embed_texts(texts)

    def _load(self) -> None:
        # Layers of open_clip do not move their weights themselves.
        memory.load_models_gpu([self._patcher], force_full_load=True)
        self._device = self._patcher.load_device
