"""Which layout and which parametrisation the keys of a file speak of; for people to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import Tensor

_LAYOUTS = (
    (("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_te3_"), "kohya"),
    (("lora_transformer_",), "OneTrainer"),
    (("lycoris_",), "LyCORIS"),
    (("diffusion_model.", "text_encoders."), "ComfyUI or ai-toolkit"),
    (("bundle_emb.",), "bundled embedding"),
)
_KINDS = (
    (("dora_scale", "lora_magnitude_vector"), "DoRA"),
    (("hada_w1_a",), "LoHa"),
    (("lokr_w1", "lokr_w1_a"), "LoKr"),
    (("lora_mid.weight",), "LoCon with mid"),
    (("diff",), "full difference"),
    (("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight",
      "up.weight"), "LoRA"),
)  # fmt: skip


def layout_of(key: str) -> str:
    """The layout that a key belongs to."""
    for prefixes, name in _LAYOUTS:
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
    """All layouts in a file, the commonest first."""
    return [name for name, _ in Counter(layout_of(key) for key in keys).most_common()]


def kinds_of(keys: Iterable[str]) -> dict[str, int]:
    """How many modules of each parametrisation; a DoRA counts as that and as what it is of."""
    counts: Counter[str] = Counter()
    for key in keys:
        for leaves, name in _KINDS:
            if any(key.endswith((f".{leaf}", f"_{leaf}")) for leaf in leaves):
                counts[name] += 1
                break
    return dict(counts)


def dtypes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """How many tensors of each dtype, without alphas."""
    names = (str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.numel() > 1)
    return dict(Counter(names).most_common())
