"""Which modules of a diffusers pipeline are sites, and what they are called."""

from __future__ import annotations

from torch import nn


def named_sites(prefix: str, model: nn.Module) -> dict[str, nn.Module]:
    """Linear and Conv2d modules under the names that LoRA files use for them."""
    sites: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # transformers 5 took ``text_model.`` out of the names; files have it.
            if prefix.startswith("text_encoder") and name.startswith(
                ("encoder.layers.", "embeddings.")
            ):
                name = f"text_model.{name}"
            sites[f"{prefix}.{name}"] = module
    return sites
