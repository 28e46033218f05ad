"""PixArt and Hunyuan-DiT."""

from __future__ import annotations

from typing import Any

from . import texts
from .parts import model_of_class
from .reduced import Reduced


def _pixart(kind: str, **other: Any) -> tuple[Any, Any]:
    model = model_of_class(
        kind,
        patch_size=2,
        in_channels=4,
        hidden_size=96,
        depth=2,
        num_heads=2,
        input_size=16,
        caption_channels=64,
        pe_interpolation=1,
        **other,
    )
    return model, texts.t5xxl("pixart_t5", "PixArtTokenizer", "pixart_te")


def pixart_sigma() -> tuple[Any, Any]:
    return _pixart("PixArtSigma", image_model="pixart_sigma", micro_condition=False)


def pixart_alpha() -> tuple[Any, Any]:
    """With the picture's size and ratio."""
    return _pixart("PixArtAlpha", image_model="pixart_alpha", micro_condition=True)


def _hunyuan(kind: str, **other: Any) -> tuple[Any, Any]:
    model = model_of_class(
        kind, hidden_size=64, depth=4, num_heads=2, text_states_dim_t5=64, **other
    )
    return model, texts.hydit()


def hunyuan_dit() -> tuple[Any, Any]:
    return _hunyuan("HunyuanDiT", image_model="hydit", size_cond=False, use_style_cond=False)


def hunyuan_dit1() -> tuple[Any, Any]:
    """The first one, with the picture's size and a style."""
    return _hunyuan("HunyuanDiT1", image_model="hydit1", size_cond=True, use_style_cond=True)


_HUNYUAN: dict[str, Any] = {
    "apart": ("pooler.",),
    "left_out": "pooler: it gets one token of every row, and then the next one",
}
DITS = {
    "PixArt Sigma": Reduced(
        pixart_sigma,
        side=34,
    ),
    "PixArt alpha": Reduced(
        pixart_alpha,
        side=34,
        entries={"width": 512, "height": 768},
        slow=True,
    ),
    "HunyuanDiT": Reduced(hunyuan_dit, **_HUNYUAN),
    "HunyuanDiT 1.0": Reduced(hunyuan_dit1, **_HUNYUAN, slow=True),
}
