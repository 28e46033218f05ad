"""peft adapters loaded in a model: the change of each, and the model without them.

peft replaces each layer that an adapter changes with its own. No weight is touched here: the base's
own layers are temporarily put back.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architectures.sites import plain_weight, weight_shape
from ..errors import LoraFileError, ModelStateError
from ..lora import LowRank
from ..lora_files.factors import Factors
from ..lora_files.rebuild import rebuild


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """All peft layers of a model. Raises :class:`ModelStateError` if an adapter is merged into
    weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {name: m for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in layers.items():
        if layer.merged:
            raise ModelStateError(
                f"Adapters are merged into the weight of {name}; remove them first "
                "(model.unmerge_adapter(), pipeline.unfuse_lora())."
            )
    return layers


@contextmanager
def without_adapters(models: Sequence[nn.Module]) -> Generator[Mapping[nn.Module, Any]]:
    """Context in which ``models`` are as they were before peft. Yields base layer → peft layer."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    places: list[tuple[nn.Module, str, Any, nn.Module]] = []
    of_base: dict[nn.Module, Any] = {}
    for model in models:
        layers = peft_layers(model)
        wrappers = (AuxiliaryTrainingWrapper, *map(type, layers.values()))
        for name, module in model.named_modules():
            if isinstance(module, wrappers):
                layer: Any = module
                plain: Any = layer.get_base_layer() if name in layers else layer.original_module
                parent, _, leaf = name.rpartition(".")
                places.append((model.get_submodule(parent), leaf, layer, plain))
                of_base[plain] = layer
    try:
        for owner, leaf, _, plain in places:
            setattr(owner, leaf, plain)
        yield of_base
    finally:
        for owner, leaf, layer, _ in places:
            setattr(owner, leaf, layer)


def change_of(layer: Any, place: str, name: str) -> LowRank | None:
    """The change of the adapter ``name`` at ``layer``, at its current strength; None if it changes
    nothing.

    float32 and exact; a DoRA has the rank of the weight. Raises :class:`LoraFileError`, naming
    ``place``, for anything but a LoRA of a linear layer or a convolution.
    """
    known = getattr(layer, "lora_A", {})
    if name not in known or hasattr(layer, "parameter_name"):
        if any(name in getattr(layer, kind) for kind in layer.adapter_layer_names):
            raise LoraFileError(
                f"Adapter {name!r} changes {place} as a {type(layer).__name__}, not as a LoRA of a "
                "linear layer or a convolution; it cannot be merged."
            )
        return None
    up, down = layer.lora_B[name], layer.lora_A[name]
    variant = getattr(layer, "lora_variant", {}).get(name)
    dora = variant is None or type(variant).__name__.startswith("Dora")
    if not dora or up.bias is not None:
        what = type(variant).__name__ if not dora else "lora_bias"
        raise LoraFileError(
            f"Adapter {name!r} has an unsupported type at {place} ({what}); only LoRA and DoRA "
            "without biases can be merged."
        )
    parts = {"up": _stored(up.weight), "down": _stored(down.weight)}
    if name in layer.lora_magnitude_vector:
        parts["output_magnitude"] = _stored(layer.lora_magnitude_vector[name].weight)
    base, scale = layer.get_base_layer(), float(layer.scaling[name])

    def weight() -> Tensor:
        return plain_weight(place, base, "A DoRA").flatten(1)

    made = rebuild(parts, weight_shape(base), scale, place, weight)
    kernel = tuple(down.weight.shape[2:]) or None
    if isinstance(made, Factors):
        change = LowRank(made.up * made.scale, made.down, kernel)
    else:
        change = LowRank.whole(made, kernel)
    return change if bool(change.up.any()) and bool(change.down.any()) else None


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)
