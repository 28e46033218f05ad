"""peft adapters loaded in a model: the change of each, and the model without them.

peft replaces each layer that an adapter changes with its own. No weight is touched here: the base's
own layers are temporarily put back.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..architectures.sites import plain_weight, weight_shape
from ..errors import LoraFileError, ModelStateError
from ..lora import LowRank
from ..lora_files.factors import Factors
from ..lora_files.rebuild import rebuild

Layers = Mapping[str, Any]
"""Name in the model → peft's layer there."""


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
def without_adapters(
    models: Sequence[nn.Module], biased: Collection[Any] = ()
) -> Generator[Mapping[nn.Module, Any]]:
    """Context in which ``models`` are as they were before peft. Exception: a peft layer in
    ``biased`` is replaced by a layer with its bias as the weights of an extra input that is always
    1. Yields base layer → peft layer."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    places: list[tuple[nn.Module, str, Any, nn.Module]] = []
    of_base: dict[nn.Module, Any] = {}
    for model in models:
        layers = peft_layers(model)
        wrappers = (AuxiliaryTrainingWrapper, *map(type, layers.values()))
        for name, module in model.named_modules():
            if not isinstance(module, wrappers):
                continue
            layer: Any = module
            plain: Any = layer.get_base_layer() if name in layers else layer.original_module
            if layer in biased:
                plain = _with_one(plain, name)
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


def has_bias(layer: Any, name: str) -> bool:
    """True if the adapter ``name`` adds a bias to the outputs of ``layer`` (``lora_bias``)."""
    known = getattr(layer, "lora_B", {})
    return name in known and known[name].bias is not None


def change_of(layer: Any, place: str, name: str, site: nn.Module) -> LowRank | None:
    """The change of the adapter ``name`` at ``site``, the base layer of ``layer``, at its current
    strength; None if it changes nothing.

    float32 and exact; a DoRA has the rank of the weight. If ``site`` has an extra input (see
    :func:`without_adapters`), that column is the adapter's bias. Raises :class:`LoraFileError`,
    naming ``place``, for anything but a LoRA of a linear layer or a convolution.
    """
    known = getattr(layer, "lora_A", {})
    if name not in known or hasattr(layer, "parameter_name"):
        if any(name in getattr(layer, kind) for kind in layer.adapter_layer_names):
            raise LoraFileError(
                f"Adapter {name!r} changes {place} as a {type(layer).__name__}, not as a LoRA of a "
                "linear layer or a convolution; it cannot be merged."
            )
        return None
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None and not type(variant).__name__.startswith("Dora"):
        raise LoraFileError(
            f"Adapter {name!r} has an unsupported type at {place} ({type(variant).__name__}); only "
            "LoRA and DoRA can be merged."
        )
    up, down = layer.lora_B[name], layer.lora_A[name]
    parts = {"up": _stored(up.weight), "down": _stored(down.weight)}
    if name in layer.lora_magnitude_vector:
        parts["output_magnitude"] = _stored(layer.lora_magnitude_vector[name].weight)
    base, scale = layer.get_base_layer(), float(layer.scaling[name])
    kernel = tuple(down.weight.shape[2:]) or None
    made = rebuild(parts, weight_shape(base), scale, place, lambda: _base_weight(base, place))
    if isinstance(made, Factors):
        change = LowRank(made.up * made.scale, made.down, kernel)
    else:
        change = LowRank.whole(made, kernel)
    width, bias = weight_shape(site)[1], up.bias
    if kernel is None and width > change.shape[1]:
        change = LowRank(change.up, functional.pad(change.down, (0, 1)))
        if bias is not None:
            one = functional.one_hot(torch.tensor([width - 1]), width).float()
            column = _stored(bias)[:, None] * scale
            change = LowRank(torch.cat([change.up, column], 1), torch.cat([change.down, one]))
    return change if bool(change.up.any()) and bool(change.down.any()) else None


def _base_weight(layer: Any, place: str) -> Tensor:
    """The weight of a layer without adapters, (out, in·kh·kw)."""
    return plain_weight(place, layer, "A DoRA or a bias").flatten(1)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32)


def _with_one(layer: Any, place: str) -> nn.Linear:
    """``layer`` with its bias as the weights of an extra input that is always 1."""
    if isinstance(layer, nn.Conv2d):
        raise LoraFileError(f"{place}: the bias of a convolution's adapter cannot be merged.")
    weight = _base_weight(layer, place)
    bias = torch.zeros(len(weight)) if layer.bias is None else _stored(layer.bias)
    joined = torch.cat([weight, bias[:, None]], 1).to(layer.weight)
    made = nn.Linear(joined.shape[1], joined.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(joined, requires_grad=False)
    made.register_forward_pre_hook(lambda _, args: (functional.pad(args[0], (0, 1), value=1.0),))
    return made.eval()
