"""PixArt and Hunyuan-DiT."""

from typing import Any

from . import texts
from .parts import model_of_class
from .reduced import Reduced


def _pixart(kind, **other):
    model = model_of_class(
        kind, patch_size=2, in_channels=4, hidden_size=96, depth=2, num_heads=2, input_size=16,
        caption_channels=64, pe_interpolation=1, **other,
    )  # fmt: skip
    return model, texts.t5xxl("pixart_t5", "PixArtTokenizer", "pixart_te")


def _hunyuan(kind, **other):
    model = model_of_class(
        kind, hidden_size=64, depth=4, num_heads=2, text_states_dim_t5=64, **other
    )
    return model, texts.hydit()


_HUNYUAN: dict[str, Any] = {
    "apart": ("pooler.",),
    "left_out": "pooler: it gets one token of every row, and then the next one",
}
DITS = {
    "PixArt Sigma": Reduced(
        lambda: _pixart("PixArtSigma", image_model="pixart_sigma", micro_condition=False), side=34
    ),
    "PixArt alpha": Reduced(
        lambda: _pixart("PixArtAlpha", image_model="pixart_alpha", micro_condition=True), side=34,
        entries={"width": 512, "height": 768}, slow=True,
    ),
    "HunyuanDiT": Reduced(
        lambda: _hunyuan("HunyuanDiT", image_model="hydit", size_cond=False, use_style_cond=False),
        **_HUNYUAN,
    ),
    "HunyuanDiT 1.0": Reduced(
        # With the picture's size and a style.
        lambda: _hunyuan("HunyuanDiT1", image_model="hydit1", size_cond=True, use_style_cond=True),
        **_HUNYUAN,
        slow=True,
    ),
}  # fmt: skip
