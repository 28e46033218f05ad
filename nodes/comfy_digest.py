"""A hash of a MODEL or CLIP with what is on it, for samples and merges that are kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from inspect import getfile, isclass, isfunction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..iteris_core.hosts.sample_store import digest, digest_of_weights
from .comfy_conds import References
from .comfy_internals import comfy, version

_SAMPLING = "model_sampling"
_FUNCTIONS = (
    "additional_models", "attachments", "callbacks", "forced_hooks", "hook_patches", "injections",
    "weight_wrapper_patches", "wrappers",
)  # fmt: skip
"""Attributes of a patcher that hold functions of other nodes, or other models."""
_COMFYUI = version()
"""The version that runs: an update counts from the next start on."""


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
        return digest([_COMFYUI, *found, *given, *settings]) if all(found) else None
    except TypeError:  # control nets, hooks
        return None


def digest_of_patcher(patcher: Any) -> str | None:
    """Weights as loaded, the LoRAs on them, the sampling of the model, and ComfyUI's own functions
    in it, such as RescaleCFG's. A merge runs uncompiled. None if anything else is on it: wrappers,
    hooks, patches of its forwards and other packs' functions have no hash."""
    from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, TORCH_COMPILE_KWARGS

    options = {n: v for n, v in patcher.model_options.items() if n != TORCH_COMPILE_KWARGS}
    patches = {n: v for n, v in patcher.object_patches.items() if n != _SAMPLING}
    functions = {name: getattr(patcher, name, None) for name in _FUNCTIONS}
    functions["wrappers"] = [
        wrapped
        for by_key in patcher.wrappers.values()
        for key, wrapped in by_key.items()
        if key != COMPILE_KEY
    ]
    if any(options.pop("transformer_options", {}).values()) or _holds(functions):
        return None
    if not all(isinstance(value, torch.dtype) for value in patches.values()):
        return None
    try:
        on = {key: [_known(*one) for one in some] for key, some in patcher.patches.items()}
        part, network = _network(patcher)
        weights = digest_of_weights(_weights(patcher), {part: network})
        named = type(patcher.model).__name__, {name: str(kind) for name, kind in patches.items()}
        sampling = _sampling(patcher), _code_of(options)
        return weights and digest([named, weights, on, sampling])
    except (OSError, TypeError, ValueError):
        return None


def _holds(value: Any) -> bool:
    """True if anything is in nested mappings and lists."""
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    if isinstance(value, list):
        return any(map(_holds, value))
    return bool(value)


def _network(patcher: Any) -> tuple[str, torch.nn.Module]:
    """Where in the patcher's model its network is, and the network."""
    part = "diffusion_model" if hasattr(patcher.model, "diffusion_model") else ""
    return part, patcher.model.get_submodule(part)


def _weights(patcher: Any) -> Iterator[tuple[str, Tensor]]:
    """The network's, without the patches that may be in them at the moment. Not those of sampling,
    which other nodes exchange."""
    part, network = _network(patcher)
    for named in (network.named_parameters, network.named_buffers):
        for key, weight in named(part):
            weight = patcher.backup[key].weight if key in patcher.backup else weight
            if (kind := getattr(weight, "tensor_type", None)) is not None:  # ComfyUI-GGUF's bytes
                key, weight = f"{key} {kind}", weight.as_subclass(Tensor)
            yield key, weight


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


def _code_of(value: Any) -> Any:
    """What the hash of ``value`` is of: of a function or class of ComfyUI's own, its name and what
    the function closes over. Raises :class:`TypeError` for those of others, which may change."""
    if isinstance(value, Mapping):
        return {str(key): _code_of(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_code_of(part) for part in value]
    if not isfunction(value) and not isclass(value):
        return value
    file, own = Path(getfile(value)).resolve(), ("comfy", "comfy_extras")
    roots = [Path(folder).resolve().parent for folder in comfy.__path__]
    if not any(file.is_relative_to(root / part) for root in roots for part in own):
        raise TypeError(f"{value.__qualname__} is not ComfyUI's")
    if isclass(value):
        return [kind.__qualname__ for kind in value.__mro__]
    given = value.__defaults__, value.__kwdefaults__
    return (
        value.__qualname__,
        _code_of(given),
        [_code_of(c.cell_contents) for c in value.__closure__ or ()],
    )
