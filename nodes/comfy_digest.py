"""A hash of a MODEL or CLIP with what is on it, for samples and merges that are kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..iteris_core.hosts.sample_store import digest, digest_of_weights
from .comfy_conds import References

_SAMPLING = "model_sampling"
_FUNCTIONS = (
    "additional_models", "attachments", "callbacks", "forced_hooks", "hook_patches", "injections",
    "weight_wrapper_patches", "wrappers",
)  # fmt: skip
"""Attributes of a patcher that hold functions of other nodes, or other models."""


def digest_of_base(
    models: Sequence[Any], clip: Any, references: References, *settings: float | bool | None
) -> str | None:
    """A hash of all that a merge has besides its LoRAs; None if a part has none."""
    patchers = [*models, *([] if clip is None else [clip.patcher])]
    found = [digest_of_patcher(patcher) for patcher in patchers]
    given: list[Any] = [references.entries, references.latent, references.mask]
    if clip is not None:
        given += [clip.layer_idx, clip.tokenizer_options, clip.apply_hooks_to_conds]
    try:
        return digest([*found, *given, *settings]) if all(found) else None
    except TypeError:  # control nets, hooks
        return None


def digest_of_patcher(patcher: Any) -> str | None:
    """Weights as loaded, the LoRAs on them, and the sampling of the model. None if anything else is
    on it: wrappers, hooks and patches of its forwards are functions, which have no hash."""
    options = patcher.model_options.get("transformer_options", {})
    patches = {n: v for n, v in patcher.object_patches.items() if n != _SAMPLING}
    if any(options.values()) or len(patcher.model_options) > 1:
        return None
    if any(_holds(getattr(patcher, name, None)) for name in _FUNCTIONS):
        return None
    if not all(isinstance(value, torch.dtype) for value in patches.values()):
        return None
    try:
        on = {key: [_known(*one) for one in some] for key, some in patcher.patches.items()}
        weights = digest_of_weights(_weights(patcher))
        named = type(patcher.model).__name__, {name: str(kind) for name, kind in patches.items()}
        return weights and digest([named, weights, on, _sampling(patcher)])
    except (TypeError, ValueError):
        return None


def _holds(value: Any) -> bool:
    """True if anything is in nested mappings and lists."""
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    return bool(value)


def _weights(patcher: Any) -> Iterator[tuple[str, Tensor]]:
    """The network's, without the patches that may be in them at the moment. Not those of sampling,
    which other nodes exchange."""
    part = "diffusion_model" if hasattr(patcher.model, "diffusion_model") else ""
    network = patcher.model.get_submodule(part)
    for named in (network.named_parameters, network.named_buffers):
        for key, weight in named(part):
            yield key, patcher.backup[key].weight if key in patcher.backup else weight


def _known(strength: float, value: Any, of_model: float, offset: Any, function: Any) -> Any:
    """A patch of a weight, where it has no function of its own."""
    if function is not None:
        raise TypeError("a function has no hash")
    value = (type(value).__name__, value.weights) if hasattr(value, "weights") else value
    return strength, value, of_model, offset


def _sampling(patcher: Any) -> Any:
    if not hasattr(patcher.model, _SAMPLING):
        return None
    sampling = patcher.get_model_object(_SAMPLING)
    numbers = {n: v for n, v in vars(sampling).items() if isinstance(v, (bool, int, float, str))}
    kinds = [kind.__name__ for kind in type(sampling).__mro__]
    return kinds, numbers, dict(sampling.state_dict())
