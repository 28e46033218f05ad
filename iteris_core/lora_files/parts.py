"""Which tensor of a LoRA file is which part of a module's change: the leaves of the keys."""

from __future__ import annotations

from collections.abc import Container

LEAVES = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "output_magnitude",
    ".lora_magnitude_vector.weight": "output_magnitude",
    ".lora_magnitude_vector.default": "output_magnitude",
    ".lora_magnitude_vector.default.weight": "output_magnitude",
    ".hada_w1_a": "hada_w1_a",
    ".hada_w1_b": "hada_w1_b",
    ".hada_w2_a": "hada_w2_a",
    ".hada_w2_b": "hada_w2_b",
    ".hada_t1": "hada_t1",
    ".hada_t2": "hada_t2",
    ".lokr_w1": "lokr_w1",
    ".lokr_w1_a": "lokr_w1_a",
    ".lokr_w1_b": "lokr_w1_b",
    ".lokr_w2": "lokr_w2",
    ".lokr_w2_a": "lokr_w2_a",
    ".lokr_w2_b": "lokr_w2_b",
    ".lokr_t2": "lokr_t2",
    ".diff": "diff",
}
"""End of a key → the part that it is."""

REFUSED = {
    ".diff_b": "a change of a bias",
    ".lora_B.bias": "a change of a bias",
    ".lora_up.bias": "a change of a bias",
    ".w_norm": "a change of a normalisation",
    ".b_norm": "a change of a normalisation",
    "_norm.scale": "a change of a normalisation",
    ".set_weight": "a replaced weight",
    ".reshape_weight": "a change of a weight's shape",
    ".oft_blocks": "OFT, which multiplies the weight",
    ".oft_diag": "OFT, which multiplies the weight",
    ".oft_R.weight": "OFT, which multiplies the weight",
    ".boft_R": "BOFT, which multiplies the weight",
    ".on_input": "IA3, which multiplies the weight",
    ".ia3_l": "IA3, which multiplies the weight",
    ".a1.weight": "GLoRA, which multiplies the weight",
    ".a2.weight": "GLoRA, which multiplies the weight",
    ".b1.weight": "GLoRA, which multiplies the weight",
    ".b2.weight": "GLoRA, which multiplies the weight",
}
"""End of a key → what it means, for what no low-rank change of a weight can say."""

_LONGEST_FIRST = sorted(LEAVES, key=len, reverse=True)


def split_key(key: str, modules: Container[str]) -> tuple[str, str] | None:
    """(module name, part) of ``key``: by preference a name of ``modules``; None without a leaf."""
    first: tuple[str, str] | None = None
    for leaf in _LONGEST_FIRST:
        if key.endswith(leaf):
            name = key[: -len(leaf)]
            if name in modules:
                return name, LEAVES[leaf]
            first = first or (name, LEAVES[leaf])
    return first


def refusal(key: str) -> str | None:
    """What ``key`` stands for if no low-rank change can say it."""
    return next((what for leaf, what in REFUSED.items() if key.endswith(leaf)), None)
