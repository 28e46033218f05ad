"""Text encoders (CLIP, T5, language models): their names, wiring and released sizes."""

from __future__ import annotations

from .sites import Component, Wiring

WIRINGS = (
    # T5: each sublayer normalises what it reads.
    Wiring({"SelfAttention.o": "layer_norm"}),
    Wiring({"EncDecAttention.o": "layer_norm"}),
    Wiring({"DenseReluDense.wo": "layer_norm"}),
    # Llama, Mistral, Qwen.
    Wiring({"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}),
    # GPT-2.
    Wiring(
        {"attn.c_proj": "ln_1", "crossattention.c_proj": "ln_cross_attn", "mlp.c_proj": "ln_2"},
        extra=frozenset({"crossattention", "ln_cross_attn"}),
    ),
    # CLIP, SigLIP, BLIP's vision model.
    Wiring(
        {
            "self_attn.out_proj": "layer_norm1",
            "self_attn.projection": "layer_norm1",
            "mlp.fc2": "layer_norm2",
        }
    ),
    # BERT, RoBERTa, BLIP's text model. The sum is normalised after the branch, so the branch reads
    # the stream directly.
    Wiring(
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
"""Where layers of transformers models add to their stream. ComfyUI uses the same names."""


CONNECTORS = ("text_conditioner", "connectors")
"""Components between text encoder and denoiser in some pipelines."""


def text_component(site: str) -> int | None:
    """0 for ``text_encoder.…``, 1 for ``text_encoder_2.…`` and so on; None for other sites."""
    component = site.partition(".")[0]
    if component == "text_encoder":
        return 0
    number = component.removeprefix("text_encoder_")
    return int(number) - 1 if number in ("2", "3", "4") else None


def is_t5(site: str) -> bool:
    """True if a site belongs to T5."""
    return text_component(site) is not None and site.partition(".")[2].startswith(
        ("encoder.block.", "shared")
    )


def clip(width: int, layers: int, projected: bool) -> Component:
    """A CLIP text encoder."""
    sizes = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64,
        "num_hidden_layers": layers, "projection_dim": width,
    }  # fmt: skip
    name = "CLIPTextModelWithProjection" if projected else "CLIPTextModel"
    return Component("transformers", name, sizes)


T5_XXL = Component("transformers", "T5EncoderModel", {
    "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
})  # fmt: skip
"""The encoder of T5 v1.1 XXL."""
