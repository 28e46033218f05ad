"""Text encoders (CLIP, T5, language models): their names, wiring and released sizes."""

from __future__ import annotations

from typing import Any

from torch import nn

from .sites import Wiring

WIRINGS = (
    # T5: each sublayer normalises what it reads.
    Wiring(frozenset({"SelfAttention", "layer_norm"}), {"SelfAttention.o": "layer_norm"}),
    Wiring(frozenset({"EncDecAttention", "layer_norm"}), {"EncDecAttention.o": "layer_norm"}),
    Wiring(frozenset({"DenseReluDense", "layer_norm"}), {"DenseReluDense.wo": "layer_norm"}),
    # Llama, Mistral, Qwen.
    Wiring(
        frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}),
        {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    ),
    # GPT-2.
    Wiring(
        frozenset({"ln_1", "attn", "ln_2", "mlp"}),
        {
            "attn.c_proj": "ln_1",
            "crossattention.c_proj": "ln_cross_attn",
            "mlp.c_proj": "ln_2",
        },
        extra=frozenset({"crossattention", "ln_cross_attn"}),
    ),
    # CLIP, SigLIP, BLIP's vision model.
    Wiring(
        frozenset({"self_attn", "layer_norm1", "mlp", "layer_norm2"}),
        {
            "self_attn.out_proj": "layer_norm1",
            "self_attn.projection": "layer_norm1",
            "mlp.fc2": "layer_norm2",
        },
    ),
    # BERT, RoBERTa, BLIP's text model. The sum is normalised after the branch, so the branch reads
    # the stream as it is.
    Wiring(
        frozenset({"attention", "intermediate", "output"}),
        {
            "attention.output.dense": "attention.self.query",
            "crossattention.output.dense": "crossattention.self.query",
            "output.dense": "intermediate.dense",
        },
        extra=frozenset({"crossattention"}),
        requires=("attention.output.LayerNorm", "output.LayerNorm"),
        forbids=("attention.LayerNorm", "LayerNorm"),
    ),
)
"""Where layers of transformers' models, as which ComfyUI names its own, add to their stream."""


def text_component(site: str) -> int | None:
    """0 for ``text_encoder.…``, 1 for ``text_encoder_2.…`` and so on; None for other sites."""
    component = site.partition(".")[0]
    if component == "text_encoder":
        return 0
    number = component.removeprefix("text_encoder_")
    return int(number) - 1 if number in ("2", "3") else None


def is_t5(site: str) -> bool:
    """Whether a site is one of T5."""
    return text_component(site) is not None and site.partition(".")[2].startswith(
        ("encoder.block.", "shared")
    )


def t5_length(tokenizer: Any, most: int) -> int:
    """``most``, a pipeline's number of T5 tokens, or fewer where its tokenizer says so."""
    return min(most, getattr(tokenizer, "model_max_length", most))


def clip(width: int, layers: int, projected: bool) -> nn.Module:
    """A CLIP text encoder; needs transformers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection if projected else CLIPTextModel
    return model(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_attention_heads=width // 64,
            num_hidden_layers=layers,
            projection_dim=width,
        )
    )


def t5_xxl() -> nn.Module:
    """The encoder of T5 v1.1 XXL; needs transformers."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config)
