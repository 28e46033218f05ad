"""Sites that no LoRA changes, added to a merge to take out the drift that the others leave.

Where the LoRAs want different things of like inputs, what least squares cannot give to all stays
behind as drift in the residual stream, and no later site that aligns its own output sees it. With
the host's ``streams`` a site's target holds that drift too (h_i is LoRA i's stream and h̃_i that of
its merged rows):

    T_i = (W0 + ΔW_i) X_i - W0 X̃_i + h_i - h̃_i.

The output of a block's feed-forward has the widest inputs and takes out most of it, whether the
LoRAs change it or not; where they do not, ΔW_i = 0.
"""

from __future__ import annotations

import torch
from torch import nn

from ..lora import LowRank
from .registry import Task


def add_repairs(task: Task) -> None:
    """Put the host's streams and repair sites into ``task``.

    Each concept that changes a component stands there with a change of zero, at its largest rank
    in that component. One concept alone leaves no drift.
    """
    assert task.host is not None
    if len(task.concepts) < 2:
        return
    task.streams = task.host.streams(set(task.references))
    ranks = _largest_ranks(task)
    modules = task.host.sites()
    like = next(c for changes in task.references.values() for c in changes if c is not None)
    added: dict[str, list[LowRank | None]] = {}
    for site in task.streams:
        if site not in task.references:
            component = site.partition(".")[0]
            zeros = [_zero(modules[site], rank) for rank in ranks[component]]
            added[site] = [zero and zero.to(like.up.dtype, like.up.device) for zero in zeros]
    task.references = {**task.references, **added}
    task.repairs = set(added)


def _largest_ranks(task: Task) -> dict[str, list[int]]:
    """component → the largest rank of every concept there, 0 where it changes nothing."""
    ranks: dict[str, list[int]] = {}
    for site, changes in task.references.items():
        largest = ranks.setdefault(site.partition(".")[0], [0] * len(changes))
        for index, change in enumerate(changes):
            largest[index] = max(largest[index], change.rank if change is not None else 0)
    return ranks


def _zero(module: nn.Module, rank: int) -> LowRank | None:
    """``module`` is linear; its weight may be stored in another shape where it is quantised."""
    if rank == 0:
        return None
    transposed = hasattr(module, "nf")  # GPT-2's Conv1D
    width = module.nf if transposed else module.out_features
    fan = module.nx if transposed else module.in_features
    assert isinstance(width, int)
    assert isinstance(fan, int)
    return LowRank(torch.zeros(width, rank), torch.zeros(rank, fan))
