"""Sites that no LoRA changes, added to a merge to take out the drift that the others leave.

Where the LoRAs want different things of like inputs, what least squares cannot give to all stays
behind as drift in the residual stream, and no later site that aligns its own output sees it. With
the host's ``streams`` a site's target holds that drift too (h_i is LoRA i's stream and h̃_i that of
its merged rows):

    T_i = (W0 + ΔW_i) X_i - W0 X̃_i + h_i - h̃_i.

The output of a block's feed-forward has the widest inputs and takes out most of it, whether the
LoRAs change it or not; where they do not, ΔW_i = 0.

Its hidden units are many and like each other, so that a part of them repairs nearly as well, and
the moments of half of them cost a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..lora import LowRank
from ..passes.job import Job

_HALF = 0.5


def add_repairs(job: Job, share: float | None = None) -> None:
    """Put the host's streams and repair sites into ``job``.

    ``share`` of the inputs of repair sites that have more inputs than outputs may be used (None:
    half for two LoRAs in pictures, which hardly compete, else all). Each concept that changes a
    component stands there with a change of zero, at its largest rank in that component. One concept
    alone leaves no drift.
    """
    assert job.host is not None
    if len(job.concepts) < 2:
        return
    job.streams = job.host.streams(set(job.references))
    ranks = _largest_ranks(job)
    modules = job.host.sites()
    like = next(c for changes in job.references.values() for c in changes if c is not None)
    if share is None:
        share = _HALF if job.host.pictures and job.loras == 2 else 1.0
    added: dict[str, list[LowRank | None]] = {}
    inputs: dict[str, Tensor | None] = {}
    for site in job.streams:
        if site not in job.references:
            component = site.partition(".")[0]
            zeros = [_zero(modules[site], rank) for rank in ranks[component]]
            added[site] = [zero and zero.to(like.up.dtype, like.up.device) for zero in zeros]
            inputs[site] = _some_inputs(added[site], share)
    job.references = {**job.references, **added}
    job.repairs = inputs


def at_inputs(changes: Sequence[LowRank | None], inputs: Tensor) -> list[LowRank | None]:
    """``changes`` as those of the chosen ``inputs`` alone."""
    return [
        None if c is None else LowRank(c.up, c.down[:, inputs.to(c.down.device)]) for c in changes
    ]


def at_all_inputs(change: LowRank, inputs: Tensor, width: int) -> LowRank:
    """A change of the chosen ``inputs`` as one of all ``width`` inputs."""
    down = change.down.new_zeros(change.rank, width)
    down[:, inputs.to(down.device)] = change.down
    return LowRank(change.up, down)


def _some_inputs(changes: Sequence[LowRank | None], share: float) -> Tensor | None:
    """Which of a site's inputs may be used, evenly over them; None: all."""
    out, width = next(change.shape for change in changes if change is not None)
    count = max(1, round(width * share))
    if width <= out or count == width:
        return None
    return torch.arange(count) * width // count


def _largest_ranks(job: Job) -> dict[str, list[int]]:
    """component → the largest rank of every concept there, 0 where it changes nothing."""
    ranks: dict[str, list[int]] = {}
    for site, changes in job.references.items():
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
