"""Where the layers of transformers models add to their residual stream.

A layer is known by the names of its parts, which say how it is wired; layers that no entry fits
(norms after a branch, parallel branches, gates, factors) have no streams: merges there do not
repair.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import nn

_SCALES = ("residual_multiplier", "residual_scale")
"""What layers call a factor on what they add to the stream (Granite, MiniCPM)"""


@dataclass(frozen=True)
class _Wiring:
    """``parts``: the layer's children (dropouts aside); ``extra``: further ones it may have.

    ``added`` maps a site to the module that reads the stream as the site's output will find it.
    ``requires`` and ``forbids`` are modules by which layers of equal names are told apart.
    """

    parts: frozenset[str]
    added: Mapping[str, str]
    extra: frozenset[str] = frozenset()
    requires: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()

    def fits(self, layer: nn.Module, inner: Set[str]) -> bool:
        names = {n for n, child in layer.named_children() if not isinstance(child, nn.Dropout)}
        return (
            not any(hasattr(layer, name) for name in _SCALES)
            and self.parts <= names <= self.parts | self.extra
            and all(name in inner for name in self.requires)
            and not any(name in inner for name in self.forbids)
        )


_WIRINGS = (
    # T5: each sublayer normalises what it reads.
    _Wiring(frozenset({"SelfAttention", "layer_norm"}), {"SelfAttention.o": "layer_norm"}),
    _Wiring(frozenset({"EncDecAttention", "layer_norm"}), {"EncDecAttention.o": "layer_norm"}),
    _Wiring(frozenset({"DenseReluDense", "layer_norm"}), {"DenseReluDense.wo": "layer_norm"}),
    # Llama, Mistral, Qwen.
    _Wiring(
        frozenset({"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}),
        {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
    ),
    # GPT-2.
    _Wiring(
        frozenset({"ln_1", "attn", "ln_2", "mlp"}),
        {
            "attn.c_proj": "ln_1",
            "crossattention.c_proj": "ln_cross_attn",
            "mlp.c_proj": "ln_2",
        },
        extra=frozenset({"crossattention", "ln_cross_attn"}),
    ),
    # CLIP, SigLIP, BLIP's vision model.
    _Wiring(
        frozenset({"self_attn", "layer_norm1", "mlp", "layer_norm2"}),
        {
            "self_attn.out_proj": "layer_norm1",
            "self_attn.projection": "layer_norm1",
            "mlp.fc2": "layer_norm2",
        },
    ),
    # BERT, RoBERTa, BLIP's text model. The sum is normalised after the branch, so the branch reads
    # the stream as it is.
    _Wiring(
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


def transformer_streams(
    sites: Mapping[str, nn.Module], changed: Set[str], model: nn.Module
) -> dict[str, nn.Module]:
    """Site of ``sites`` → the module whose input is its residual stream, in the model's order.

    Only those parts of the model (its children: encoder, decoder, vision model, …) in which some
    site of ``changed`` lies.
    """
    names = {module: site for site, module in sites.items()}
    wanted = {_part(site) for site in changed}
    streams: dict[str, nn.Module] = {}
    for layer in model.modules():
        inner = dict(layer.named_modules())
        for wiring in _WIRINGS:
            if not wiring.fits(layer, inner.keys()):
                continue
            for added, reader in wiring.added.items():
                site = names.get(inner.get(added, layer))
                if site is not None and reader in inner and _part(site) in wanted:
                    streams[site] = inner[reader]
    return streams


def _part(site: str) -> str:
    return ".".join(site.split(".")[:2])
