"""A module's factors as in files, bit-exact in half precision where possible, and their alphas as
peft stores them: in a LoraConfig, in ``lora_adapter_metadata`` or an adapter's folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraFileError, OutputError
from ..lora import Lora, LowRank


def stored_factors(change: LowRank, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(up, down) as in files: without the scale, in the shapes of a Linear's or Conv2d's weights,
    in ``dtype``."""
    up, down = (change.up / change.scale).to(dtype), change.down.to(dtype)
    if change.kernel is not None:
        up, down = up[:, :, None, None], down.reshape(change.rank, -1, *change.kernel)
    return up.contiguous(), down.contiguous()


def store_all(
    lora: Lora, dtype: torch.dtype, one_alpha: Container[str], *, even: bool = False
) -> dict[str, LowRank]:
    """Every site's change, float32, as a file in ``dtype`` has it, by component: exact with scale 1
    if possible for all, otherwise with the scales that were folded in (one scale in components of
    ``one_alpha``), otherwise rounded. With ``even``, components of ``one_alpha`` have one alpha
    each."""
    stored: dict[str, LowRank] = {}
    for component in {site.partition(".")[0]: None for site in lora.sites}:
        sites = {s: c for s, c in lora.sites.items() if s.startswith(f"{component}.")}
        exact = {site: exactly(change, 1.0, dtype) for site, change in sites.items()}
        together = component not in one_alpha or len({c.scale for c in sites.values()}) == 1
        if together and not all(exact.values()):
            scaled = {site: exactly(c, c.scale, dtype) for site, c in sites.items()}
            exact = scaled if all(scaled.values()) else exact
        alpha = max(change.rank for change in sites.values())
        evened = even and component in one_alpha
        if evened and not all(exact.values()) and any(c.rank != alpha for c in sites.values()):
            stored |= {s: _rounded(s, c, dtype, alpha / c.rank) for s, c in sites.items()}
            continue
        module = {site: exact[site] or _rounded(site, c, dtype) for site, c in sites.items()}
        if evened and not all(math.isclose(c.alpha, alpha) for c in module.values()):
            # The same changes with one alpha: scaled by a power of two, or padded with zeros.
            module = {
                site: exactly(c, c.scale * alpha / c.rank, dtype) or c.padded(alpha)
                for site, c in module.items()
            }
        stored |= module
    return stored


def exactly(change: LowRank, scale: float, dtype: torch.dtype) -> LowRank | None:
    """The change with this ``scale``, if a file in ``dtype`` represents it exactly."""
    change = replace(change.to(torch.float32, "cpu"), scale=scale)
    up, down = (factor.float().flatten(1) for factor in stored_factors(change, dtype))
    return change if torch.equal(up * scale, change.up) and torch.equal(down, change.down) else None


def _rounded(site: str, change: LowRank, dtype: torch.dtype, scale: float = 1.0) -> LowRank:
    """The change as a file in ``dtype`` with this ``scale`` has it, with up and down balanced by a
    power of two."""
    change = change.scaled(1 / scale)
    up, down = change.up.to("cpu", torch.float32), change.down.to("cpu", torch.float32)
    largest = float(up.abs().max()), float(down.abs().max())
    shift = round(math.log2(largest[1] / largest[0]) / 2) if min(largest) > 0 else 0
    up = torch.ldexp(up, torch.tensor(shift)).to(dtype).float()
    down = torch.ldexp(down, torch.tensor(-shift)).to(dtype).float()
    if not bool(torch.isfinite(up).all() and torch.isfinite(down).all()):
        raise OutputError(
            f"Site {site}: values are too large for {str(dtype).removeprefix('torch.')}; write "
            "float32 (option dtype float32)."
        )
    return LowRank.folded(up, down, scale, change.kernel)


_PLAIN = re.compile(r"[\w.\\^$*+?|\[\]-]{1,300}")


def adapter_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Component → LoraConfig, as diffusers' pipelines save them; "" for a model saved by itself."""
    text = metadata.get("lora_adapter_metadata")
    if not text:
        return {}
    try:
        flat = json.loads(text)
        configs: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            component, _, name = key.rpartition(".")
            configs.setdefault(component, {})[name] = value
        return {c: config for c, config in configs.items() if "lora_alpha" in config}
    except (ValueError, AttributeError, RecursionError) as error:
        raise LoraFileError(
            f"{path}: lora_adapter_metadata is not valid JSON ({error})."
        ) from error


def scale_of(
    path: Path, configs: Mapping[str, Mapping[str, Any]], site: str, name: str, rank: int
) -> float | None:
    """The scale of the module ``site``, in the file ``name``; None if it has no config."""
    parts = [full.partition(".") for full in (site, name)]
    for component, _, module in (*parts, ("", "", parts[0][2])):
        if component in configs:
            return configured_scale(path, configs[component], [module, name], rank)
    return None


def configured_scale(
    path: Path, config: Mapping[str, Any], names: Collection[str], rank: int
) -> float:
    """alpha / rank, or alpha / √rank for rsLoRA; the first matching pattern decides alpha.

    A pattern is a regular expression for the end of a module's name, as in peft, whose own function
    is not called: ComfyUI has no peft, and a hostile pattern could make it hang. ``names`` are of
    one module; in a text encoder they may start with ``text_model.``, as transformers 4 has it.
    """
    short = [name.removeprefix("text_model.") for name in names]
    names = {*names, *short, *(f"text_model.{name}" for name in short)}
    alpha = config.get("lora_alpha", 8)  # peft's own default
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise LoraFileError(f"{path}: alpha_pattern of the LoraConfig is not a table.")
    for pattern, value in patterns.items():
        if any(_fits(path, pattern, name) for name in names):
            alpha = value
            break
    try:
        number = float(alpha)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise LoraFileError(
            f"{path}: lora_alpha of the LoraConfig is {str(alpha)[:40]!r}, not a number."
        )
    return number / (rank**0.5 if config.get("use_rslora") else rank)


def _fits(path: Path, pattern: str, module: str) -> bool:
    if module == pattern or module.endswith(f".{pattern}"):
        return True
    # Groups could nest repetitions and never finish; no trainer writes them.
    if not _PLAIN.fullmatch(pattern) or sum(pattern.count(c) for c in "*+?") > 3:
        raise LoraFileError(
            f"{path}: alpha_pattern {pattern[:80]!r} of the LoraConfig is too complicated; save "
            "the adapter with plain module names instead."
        )
    try:
        return re.fullmatch(rf"(.*\.)?({pattern})", module) is not None
    except re.error as error:
        raise LoraFileError(
            f"{path}: alpha_pattern {pattern[:80]!r} of the LoraConfig: {error}."
        ) from error


def lora_config(modules: Mapping[str, tuple[int, float]], mark: str) -> dict[str, Any]:
    """The fields of a LoraConfig for ``modules``, name → (rank, alpha); ``mark`` is prefixed to
    names in patterns."""
    ranks = [rank for rank, _ in modules.values()]
    common = max(set(ranks), key=ranks.count)
    return {
        "r": common,
        "lora_alpha": common,
        "target_modules": sorted(modules),
        "rank_pattern": {mark + n: rank for n, (rank, _) in modules.items() if rank != common},
        "alpha_pattern": {mark + n: alpha for n, (_, alpha) in modules.items() if alpha != common},
    }
