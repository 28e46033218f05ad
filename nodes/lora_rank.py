"""A LoRA's tensors at a smaller rank, without its base model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..iteris_core.lora import Lora, LowRank
from ..iteris_core.lora_files.tensors import content_hash
from ..iteris_core.report.provenance import cut_lora

_UP, _DOWN, _ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"


def cut_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], rank: int, *, ordered: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in kohya layout and their metadata, with no module above ``rank``; ``ordered`` as in
    :func:`..iteris_core.linalg.lowrank.at_rank`. Tensors of other layouts stay as they are."""
    cut = cut_lora(_larger(tensors, metadata, rank), rank, ordered=ordered)
    smaller = dict(tensors)
    for name, change in cut.sites.items():
        up, down = tensors[name + _UP], tensors[name + _DOWN]
        new_up = change.up.reshape(len(up), -1, *up.shape[2:])
        smaller[name + _UP] = new_up.to(up.dtype).contiguous()
        smaller[name + _DOWN] = change.down.reshape(-1, *down.shape[1:]).to(down.dtype).contiguous()
        if name + _ALPHA in tensors:
            smaller[name + _ALPHA] = tensors[name + _ALPHA] * (rank / up.shape[1])
    numbers = {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    if "modelspec.hash_sha256" in metadata:
        numbers["modelspec.hash_sha256"] = "0x" + content_hash(smaller)
    return smaller, {**cut.metadata, **numbers}


def _larger(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], rank: int) -> Lora:
    """The modules above ``rank`` under their names in the file, without their scales."""
    sites: dict[str, LowRank] = {}
    for key, up in tensors.items():
        if key.endswith(_UP) and up.shape[1] > rank:
            name = key.removesuffix(_UP)
            down = tensors[name + _DOWN]
            sites[name] = LowRank(up.flatten(1).float(), down.flatten(1).float())
    return Lora(sites, metadata=metadata)
