"""Read a LoRA file through diffusers' own conversions, and hold the result against the base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoraFileError, brief
from ..lora import Lora, LowRank
from ..lora_files import read_tensors

_KNOWN_LEAVES = ("lora_A.weight", "lora_B.weight", "alpha")


def read_lora(pipeline: Any, sites: Mapping[str, nn.Module], path: Path) -> Lora:
    """Every layout that ``pipeline.lora_state_dict`` knows, scale folded in, float32.

    Raises :class:`LoraFileError` naming the file, the key and both shapes where it does not fit.
    """
    tensors, metadata = read_tensors(path)
    _refuse_unsupported(path, tensors)
    converted, alphas = _to_peft_names(pipeline, path, tensors)
    factors, scales = _group(path, converted, alphas, metadata)
    unknown = [site for site in factors if site not in sites]
    if unknown:
        raise LoraFileError(_mismatch(path, unknown, factors, sites))
    found = {
        site: _low_rank(path, site, parts, scales.get(site, 1.0), sites[site])
        for site, parts in factors.items()
    }
    return Lora(found, path.stem, metadata)


def _refuse_unsupported(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key in tensors:
        for mark, kind in (
            ("dora_scale", "DoRA"),
            ("lora_magnitude_vector", "DoRA"),
            ("hada_", "LoHa"),
            ("lokr_", "LoKr"),
            ("lora_mid", "a Tucker-decomposed LoCon"),
            (".diff", "full weight differences"),
        ):
            if mark in key:
                raise LoraFileError(
                    f"{path} uses {kind} (key {key}), which cannot be merged yet; "
                    "use a plain LoRA of the concept."
                )


def _to_peft_names(
    pipeline: Any, path: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Keys ``<component>.<module>.lora_A.weight`` and ``….lora_B.weight``, and alphas by module."""
    from diffusers.utils.state_dict_utils import (
        StateDictType,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    try:
        state, alphas, _ = pipeline.lora_state_dict(
            dict(tensors), unet_config=pipeline.unet.config, return_lora_metadata=True
        )
    except Exception as error:  # diffusers raises many kinds; all of them mean the same here
        raise LoraFileError(
            f"{path} is in no layout that diffusers can read ({brief(error)}); "
            "is it a LoRA of this kind of model?"
        ) from error

    def rename(component: str, keys: dict[str, Any]) -> dict[str, Any]:
        """Apply diffusers' key conversions; they look at keys only, so values may be anything.

        The kind is named, since diffusers guesses it from sites that a file need not have.
        """
        if component.startswith("text_encoder"):
            keys = convert_state_dict_to_peft(keys, StateDictType.DIFFUSERS_OLD)
        return convert_unet_state_dict_to_peft(keys)

    converted: dict[str, Tensor] = {}
    modules: dict[str, float] = {}
    components = [c for c in ("unet", "text_encoder_2", "text_encoder") if _has(state, c)]
    for component in components:
        part = {k.removeprefix(f"{component}."): v for k, v in state.items() if _of(k, component)}
        for key, tensor in rename(component, part).items():
            converted[f"{component}.{_canonical(component, key)}"] = tensor
        named = {
            k.removeprefix(f"{component}.").removesuffix(".alpha"): v
            for k, v in (alphas or {}).items()
            if _of(k, component)
        }
        # An alpha is named after its module or after the module's down matrix.
        dressed = {
            name if ".down." in name else f"{name}.lora.down.weight": value
            for name, value in named.items()
        }
        for key, value in rename(component, dressed).items():
            module = _canonical(component, key.split(".lora")[0])
            modules[f"{component}.{module}"] = float(value)
    for key, tensor in state.items():
        if not any(_of(key, component) for component in components):
            converted[key] = tensor
    return converted, modules


def _has(state: Mapping[str, Tensor], component: str) -> bool:
    return any(_of(key, component) for key in state)


def _of(key: str, component: str) -> bool:
    return key.startswith(f"{component}.")


def _canonical(component: str, key: str) -> str:
    if component.startswith("text_encoder") and key.startswith("encoder."):
        return f"text_model.{key}"
    return key


def _group(
    path: Path,
    state: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    metadata: Mapping[str, str],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Tensors by site and leaf, and the scale alpha / rank of every site (1 if there is none)."""
    factors: dict[str, dict[str, Tensor]] = {}
    own_alphas = dict(alphas)
    for key, tensor in state.items():
        leaf = next((leaf for leaf in _KNOWN_LEAVES if key.endswith(f".{leaf}")), None)
        if leaf is None:
            raise LoraFileError(
                f"{path}: key {key} {tuple(tensor.shape)} is of no kind that is known here; "
                "nothing is skipped silently, so this file cannot be merged."
            )
        site = key.removesuffix(f".{leaf}")
        if leaf == "alpha":
            own_alphas[site] = float(tensor)
        else:
            factors.setdefault(site, {})[leaf] = tensor
    scales: dict[str, float] = {}
    configs = _adapter_configs(path, metadata)
    for site, parts in factors.items():
        if set(parts) != {"lora_A.weight", "lora_B.weight"}:
            raise LoraFileError(
                f"{path}: site {site} has only {', '.join(parts)}; its other half is missing."
            )
        rank = parts["lora_A.weight"].shape[0]
        if rank == 0:
            raise LoraFileError(f"{path}: site {site} has rank 0; the file is broken.")
        component, _, module = site.partition(".")
        if site in own_alphas:
            scales[site] = own_alphas[site] / rank
        elif component in configs:
            scales[site] = _configured_scale(configs[component], module, rank)
    return factors, scales


def _adapter_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The LoraConfig of each component from ``lora_adapter_metadata``."""
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        flat = json.loads(text)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.partition(".")
            configs.setdefault(component, {})[name] = value
        return {c: config for c, config in configs.items() if "lora_alpha" in config}
    except (ValueError, AttributeError) as error:
        raise LoraFileError(
            f"{path}: lora_adapter_metadata is not valid JSON ({error})."
        ) from error


def _configured_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA, with peft's pattern rule."""
    from peft.utils.other import get_pattern_key

    patterns = dict(config.get("alpha_pattern") or {})
    alpha = config["lora_alpha"]
    if patterns:
        alpha = patterns.get(get_pattern_key(list(patterns), module), alpha)
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _low_rank(
    path: Path, site: str, parts: Mapping[str, Tensor], scale: float, module: nn.Module
) -> LowRank:
    down, up = parts["lora_A.weight"], parts["lora_B.weight"]
    weight = module.weight
    assert isinstance(weight, Tensor)
    convolution = isinstance(module, nn.Conv2d)
    wanted = (weight.shape[0], *weight.shape[1:])
    linear_in_conv = convolution and down.ndim == 2 and tuple(weight.shape[2:]) == (1, 1)
    if linear_in_conv:
        down, up = down[:, :, None, None], up[:, :, None, None]
    if not convolution and down.ndim == 4 and tuple(down.shape[2:]) == (1, 1):
        down, up = down.flatten(1), up.flatten(1)
    fits = (
        down.ndim == weight.ndim
        and up.ndim == weight.ndim
        and up.shape[0] == weight.shape[0]
        and up.shape[1] == down.shape[0]
        and down.shape[1:] == weight.shape[1:]
    )
    if not fits:
        raise LoraFileError(
            f"{path}: site {site} has down {tuple(down.shape)} and up {tuple(up.shape)}, but the "
            f"base model's weight there is {wanted}; this LoRA was made for another base model."
        )
    kernel = (int(weight.shape[2]), int(weight.shape[3])) if convolution else None
    return LowRank(
        up.flatten(1).to(torch.float32) * scale, down.flatten(1).to(torch.float32), kernel
    )


def _mismatch(
    path: Path,
    unknown: list[str],
    factors: Mapping[str, Mapping[str, Tensor]],
    sites: Mapping[str, nn.Module],
) -> str:
    first = ", ".join(
        f"{site} (down {tuple(factors[site]['lora_A.weight'].shape)}, "
        f"up {tuple(factors[site]['lora_B.weight'].shape)})"
        for site in unknown[:3]
    )
    return (
        f"{path}: {len(unknown)} of {len(factors)} sites match nothing in the base model "
        f"({len(sites)} sites); the first are {first}. This LoRA was made for another base model."
    )
