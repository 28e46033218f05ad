"""The world's own open_clip model: its configuration, and how it is loaded without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

EMBED, CONTEXT = 64, 32
MEAN = STD = (0.5, 0.5, 0.5)


def model_config(vocabulary: int) -> dict[str, Any]:
    """open_clip's `model_cfg`: a small timm ResNet at 64 pixels and a text tower of 3 layers."""
    return {
        "embed_dim": EMBED,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "test_resnet",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
        },
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": vocabulary,
            "width": 96,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "local",  # with local-dir:, the folder itself
        },
    }


def preprocess_config() -> dict[str, Any]:
    """open_clip's `preprocess_cfg`: pictures are 64 x 64 in [-1, 1]."""
    return {
        "size": [64, 64],
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }


def load(folder: Path) -> tuple[Any, Any, Any]:
    """(model, preprocess, tokenizer) from `folder`, through open_clip's local-dir scheme."""
    import open_clip

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)
