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

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..activations.site import site_of
from ..lora import LowRank, SiteChanges
from ..passes.job import Job

Repairs = Mapping[str, Tensor | None]
"""Repair sites, and which of their inputs may be used (None: all)."""


def with_repairs(job: Job, share: float | None = None) -> tuple[Job, Repairs]:
    """``job`` with the host's streams and repair sites, and those.

    ``share`` of the inputs of repair sites that have more inputs than outputs may be used (None: as
    the job's policy says for so many LoRAs). Each concept that changes a component stands there
    with a change of zero, at its largest rank in that component. One concept alone leaves no drift.
    """
    if len(job.concepts) < 2:
        return job, {}
    if share is None:
        share = job.policy.repair_inputs_for(job.loras, job.host.pictures)
    streams = job.host.streams(set(job.changes))
    ranks = _largest_ranks(job.changes)
    modules = job.host.sites()
    first = next(iter(job.changes.values()))
    like, sums = first.like.up, first.sums
    added: dict[str, SiteChanges] = {}
    inputs: dict[str, Tensor | None] = {}
    for name in streams:
        if name not in job.changes:
            site = site_of(name, modules[name])
            added[name] = SiteChanges(
                tuple(
                    site.zero(rank).to(like.dtype, like.device) if rank else None
                    for rank in ranks[name.partition(".")[0]]
                ),
                sums,
            )
            inputs[name] = _evenly(*site.shape, share)
    return replace(job, changes={**job.changes, **added}, streams=streams), inputs


def at_all_inputs(change: LowRank, inputs: Tensor, width: int) -> LowRank:
    """A change of the chosen ``inputs`` as one of all ``width`` inputs."""
    down = change.down.new_zeros(change.rank, width)
    down[:, inputs.to(down.device)] = change.down
    return LowRank(change.up, down)


def _evenly(out: int, width: int, share: float) -> Tensor | None:
    """The inputs of a site that may be used, evenly over them; None: all."""
    count = max(1, round(width * share))
    if width <= out or count == width:
        return None
    return torch.arange(count) * width // count


def _largest_ranks(changes: Mapping[str, SiteChanges]) -> dict[str, list[int]]:
    """component → the largest rank of every concept there, 0 where it changes nothing."""
    ranks: dict[str, list[int]] = {}
    for site, by_concept in changes.items():
        largest = ranks.setdefault(site.partition(".")[0], [0] * len(by_concept))
        for concept, change in by_concept.present.items():
            largest[concept] = max(largest[concept], change.rank)
    return ranks
