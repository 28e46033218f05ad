"""The sites of a model, and the shapes of their weights."""

from __future__ import annotations

from typing import Any

from torch import nn


def weight_shape(module: Any) -> tuple[int, ...]:
    """(out, in) or (out, in / groups, kh, kw) of the weight, also where it is stored transposed
    (Conv1D of transformers) or packed (quantised)."""
    if isinstance(module, nn.Conv2d):
        kernel = (module.kernel_size[0], module.kernel_size[1])
        return (module.out_channels, module.in_channels // module.groups, *kernel)
    if hasattr(module, "nf"):
        return (module.nf, module.nx)
    return (module.out_features, module.in_features)


def named_sites(component: str, model: nn.Module) -> dict[str, nn.Module]:
    """Linear and Conv2d modules of a component under the names that LoRA files use for them."""
    sites: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # transformers 5 took ``text_model.`` out of the names; files have it.
            if component.startswith("text_encoder") and name.startswith(
                ("encoder.layers.", "embeddings.")
            ):
                name = f"text_model.{name}"
            sites[f"{component}.{name}"] = module
    return sites
