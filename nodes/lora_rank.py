"""A LoRA's tensors at a smaller rank, without its base model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..iteris_core.linalg.lowrank import at_rank as change_at_rank
from ..iteris_core.lora import LowRank
from ..iteris_core.lora_files.saving import content_hash
from ..iteris_core.report.provenance import with_cut

_UP, _DOWN = ".lora_up.weight", ".lora_down.weight"


def at_rank(tensors: Mapping[str, Tensor], rank: int, *, ordered: bool) -> dict[str, Tensor]:
    """``tensors`` in kohya layout, with no module above ``rank``; ``ordered`` as in
    :func:`..iteris_core.truncation.at_rank`."""
    found = dict(tensors)
    for key, up in tensors.items():
        if not key.endswith(_UP) or up.shape[1] <= rank:
            continue
        name = key.removesuffix(_UP)
        down = tensors[name + _DOWN]
        whole = LowRank(up.flatten(1).float(), down.flatten(1).float())
        change = change_at_rank(whole, rank, ordered=ordered)
        new_up = change.up.reshape(up.shape[0], -1, *up.shape[2:])
        new_down = change.down.reshape(-1, *down.shape[1:])
        found[key] = new_up.to(up.dtype).contiguous()
        found[name + _DOWN] = new_down.to(down.dtype).contiguous()
        alpha = tensors.get(name + ".alpha")
        if alpha is not None:
            found[name + ".alpha"] = alpha * (rank / up.shape[1])
    return found


def metadata_at_rank(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], rank: int, *, ordered: bool
) -> dict[str, str]:
    """``metadata`` for ``tensors`` that were cut to ``rank``."""
    found = with_cut(metadata, rank, ordered=ordered)
    found |= {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    if "modelspec.hash_sha256" in found:
        found["modelspec.hash_sha256"] = "0x" + content_hash(tensors)
    return found
