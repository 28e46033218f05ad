"""Ranks shared out over the layers of a merge, against plain matrices."""

import itertools
import re

import pytest
import torch
from oracle import (
    SITES,
    ModuleHost,
    Net,
    captured_inputs,
    changed,
    dense_changes,
    make_data,
    make_lora,
)
from tiny import random_lora

from iteris_core import Concept, SettingsError, merge_loras

pytestmark = pytest.mark.usefixtures("unmeasured")

PLAIN = {"ridge": 1e-9, "saliency": 0.0, "precision": "float64"}
LORAS = [make_lora(1, rank=2), make_lora(2, rank=3), make_lora(3, rank=3, size=0.2)]


def merge(**settings):
    concepts = [Concept(lora, prompts=["unused"]) for lora in LORAS]
    host = ModuleHost(Net(), make_data(3))
    return merge_loras(host, concepts, settings={**PLAIN, **settings})


def numbers(site):
    return sum(LORAS[0].sites[site].shape)


@torch.no_grad()
def wanted_ranks(rank):
    """By SVDs of the outputs of the whole merge, on plainly captured inputs."""
    model, data, deltas = Net(), make_data(3), [dense_changes(lora) for lora in LORAS]
    whole = dense_changes(merge().lora)
    references = [captured_inputs(changed(model, d), x) for d, x in zip(deltas, data, strict=True)]
    seen = [captured_inputs(changed(model, whole), x) for x in data]
    every = []
    for site in SITES:
        module = model.get_submodule(site)
        w0, bias = module.weight.flatten(1), 0 if module.bias is None else module.bias
        given = torch.cat([x[site] @ whole[site].mT / len(x[site]) ** 0.5 for x in seen])
        energies = torch.linalg.svdvals(given) ** 2
        outputs = sum(
            (x[site] @ (w0 + d[site]).mT + bias).square().sum() / len(x[site])
            for x, d in zip(references, deltas, strict=True)
        )
        lost = [1.0, *(1 - energies.cumsum(0) / energies.sum()).tolist()]
        total = float((energies.sum() / outputs).sqrt())
        worths = [total * (a**2 - b**2) for a, b in itertools.pairwise(lost)]
        every += [(worth / numbers(site), k, site) for k, worth in enumerate(worths) if k < 8]
    ranks = dict.fromkeys(SITES, 1)
    left = sum(min(rank, 8) * numbers(site) for site in SITES) - sum(map(numbers, SITES))
    closed = set()
    for _, k, site in sorted(every, reverse=True):
        if k and site not in closed and numbers(site) <= left:
            ranks[site] += 1
            left -= numbers(site)
        elif k:
            closed.add(site)
    return ranks


@pytest.mark.parametrize("rank", [2, 4])
def test_ranks_go_where_outputs_want_them(rank):
    ours = merge(rank=rank, share_ranks=True).lora
    found = {site: change.rank for site, change in ours.sites.items()}
    assert found == wanted_ranks(rank)
    assert len(set(found.values())) > 1
    size = sum(sum(c.shape) * c.rank for c in ours.sites.values())
    assert size <= rank * sum(map(numbers, SITES))


def test_a_rank_that_all_layers_may_have_is_the_whole_merge():
    ours, whole = merge(rank=8, share_ranks=True).lora, merge().lora
    for site, change in ours.sites.items():
        torch.testing.assert_close(change.dense(), whole.sites[site].dense())


@pytest.mark.parametrize("rank", [1, 2])
def test_repairs_do_not_make_the_file_larger(host, rank):
    loras = [random_lora(host, seed, 3, lambda site: ".attn2.to_k" in site) for seed in (1, 2)]
    concepts = [Concept(lora, trigger=lora.name) for lora in loras]
    quick = {"samples": 3, "timesteps": 1, "latents": "noise"}
    settings = {"rank": rank, "share_ranks": True}
    result = merge_loras(host, concepts, calibration=quick, settings=settings)
    sizes = {site: sum(change.shape) for site, change in loras[0].sites.items()}
    assert result.lora.sites.keys() >= sizes.keys()
    written = sum(sum(change.shape) * change.rank for change in result.lora.sites.values())
    assert written <= rank * sum(sizes.values())
    assert (result.lora.sites.keys() > sizes.keys()) == (rank > 1)  # repairs have room left
    most = int(re.search(r"rank at most (\d+),", result.report.outlook)[1])
    mib = float(re.search(r"file at most ([\d.]+) MiB", result.report.outlook)[1])
    assert max(result.lora.ranks) <= most
    assert written * 2 / 2**20 <= mib + 0.05


def test_what_ranks_cannot_be_shared_with():
    with pytest.raises(SettingsError, match="needs a whole number as rank"):
        merge(share_ranks=True)
    with pytest.raises(SettingsError, match="needs a whole number as rank"):
        merge(share_ranks=True, rank=0.9)
    for other in ({"objective": "adapter"}, {"schedule": "jacobi"}):
        with pytest.raises(SettingsError, match="schedule=sweep"):
            merge(share_ranks=True, rank=2, **other)
