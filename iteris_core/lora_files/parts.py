"""Keys of a LoRA file: which part of a module's change a tensor is, and readable names for layout
and parametrisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable

_LEAVES = {
    "down": (
        ".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora_A",
        "_lora.down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", ".down.weight",
    ),
    "up": (
        ".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora_B",
        "_lora.up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", ".up.weight",
    ),
    "mid": (".lora_mid.weight",),
    "magnitude": (".dora_scale",),
    "output_magnitude": (
        ".lora_magnitude_vector", ".lora_magnitude_vector.weight",
        ".lora_magnitude_vector.default", ".lora_magnitude_vector.default.weight",
    ),
}  # fmt: skip
_CALLED_SO = (
    "alpha", "diff", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2",
    "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2",
    "oft_blocks", "rescale",
)  # fmt: skip
LEAVES = {
    **{leaf: part for part, leaves in _LEAVES.items() for leaf in leaves},
    **{f".{part}": part for part in _CALLED_SO},
    **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2")},
}
"""End of a key → its part."""

REFUSED = {
    (".diff_b", ".lora_B.bias", ".lora_up.bias"): "a change of a bias",
    (".w_norm", ".b_norm", "_norm.scale"): "a change of a normalisation",
    (".set_weight",): "a replaced weight",
    (".reshape_weight",): "a change of a weight's shape",
    (".oft_diag", ".oft_R.weight", ".boft_R"): "OFT in a form that ComfyUI does not load",
    (".on_input", ".ia3_l"): "IA3, which multiplies the weight",
}
"""Ends of a key → their meaning, for keys that are not read as a weight's change."""

_LAYOUTS = {
    ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"): "kohya",
    ("lora_transformer_",): "OneTrainer",
    ("lycoris_",): "LyCORIS",
    ("diffusion_model.", "text_encoders."): "ComfyUI or ai-toolkit",
    ("bundle_emb.",): "bundled embedding",
}
_KINDS = {
    "magnitude": "DoRA", "output_magnitude": "DoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr", "mid": "LoCon with mid", "diff": "full difference", "up": "LoRA",
    "oft_blocks": "OFT or BOFT", "a1": "GLoRA",
}  # fmt: skip
_LONGEST_FIRST = sorted(LEAVES, key=len, reverse=True)


def split_key(key: str, modules: Container[str]) -> tuple[str, str] | None:
    """(module name, part) of ``key``, preferably with a name from ``modules``; None without a
    leaf."""
    leaves = [leaf for leaf in _LONGEST_FIRST if key.endswith(leaf)]
    splits = [(key.removesuffix(leaf), LEAVES[leaf]) for leaf in leaves]
    return next((split for split in splits if split[0] in modules), splits[0] if splits else None)


def modules_of(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Module name → part → its key, for ``keys`` with a leaf."""
    modules: dict[str, dict[str, str]] = {}
    for key in keys:
        if split := split_key(key, ()):
            modules.setdefault(split[0], {})[split[1]] = key
    return modules


def is_lora(keys: Iterable[str]) -> bool:
    """True if one of a file's ``keys`` ends like a part of a module's change; no model has such
    keys."""
    return any(split_key(key, ()) is not None or refusal(key) is not None for key in keys)


def refusal(key: str) -> str | None:
    """The parametrisation of ``key`` if no low-rank change can express it."""
    return next((what for leaves, what in REFUSED.items() if key.endswith(leaves)), None)


def _layout_of(key: str) -> str:
    for prefixes, name in _LAYOUTS.items():
        if key.startswith(prefixes):
            return name
    original = any(f"{part}_blocks." in key for part in ("double", "single", "joint"))
    if original and ".processor." in key:
        return "XLabs"
    if "_lora." in key or ".lora." in key or ".lora_linear_layer." in key:
        return "diffusers (old)"
    if ".lora_A" in key or ".lora_B" in key or ".lora_magnitude_vector" in key:
        component = key.partition(".")[0]
        if component in ("unet", "transformer") or component.startswith("text_encoder"):
            return "diffusers (peft)"
        return "BFL" if original else "peft"
    return "unknown"


def layouts_of(keys: Iterable[str]) -> list[str]:
    """All layouts in a file, the most common first."""
    return [name for name, _ in Counter(_layout_of(key) for key in keys).most_common()]


def kinds_of(keys: Iterable[str]) -> dict[str, int]:
    """The number of modules per parametrisation; a DoRA also counts as its underlying kind."""
    parts = [part for parts in modules_of(keys).values() for part in parts]
    return dict(Counter(_KINDS[part] for part in parts if part in _KINDS))
