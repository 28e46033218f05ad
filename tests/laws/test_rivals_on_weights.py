"""DELLA, WUDI and ACE against plain float64 transcriptions of what their authors' code computes."""

from __future__ import annotations

import pytest
import torch
from oracle import SITES, dense_changes, difference, make_lora
from test_methods import DENSE, LORAS, WIDE, merge, per_site

from iteris_core import SettingsError


def magpruned(change, density, window, uniform):
    """Row by row: ranks of magnitudes from 1, chances between density ∓ window / 2, 1/p for all
    that stay."""
    pruned = torch.zeros_like(change)
    for row, values in enumerate(change):
        order = values.abs().argsort()
        for rank, column in enumerate(order, 1):
            normed = (rank - 1) / (len(values) - 1)
            chance = (density - window / 2) + normed * window
            if uniform[row, column] < chance:
                pruned[row, column] = values[column] / chance
    return pruned


def drawn(seed):
    """Uniform numbers for every concept, site by site, from one generator."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: [torch.rand(d[site].shape, generator=generator, dtype=torch.float64) for d in DENSE]
        for site in SITES
    }


@pytest.mark.parametrize("name", ["della", "della-linear"])
def test_della_drops_by_the_ranks_of_magnitudes(name):
    uniform = drawn(7)
    wanted = {}
    for site in SITES:
        pruned = torch.stack(
            [
                magpruned(dense[site], 0.6, 0.3, some)
                for dense, some in zip(DENSE, uniform[site], strict=True)
            ]
        )
        if name == "della":
            elected = torch.where(pruned.sum(0) >= 0, 1.0, -1.0)
            agree = pruned.sign() == elected
            wanted[site] = 1.1 * (pruned * agree).sum(0) / agree.sum(0).clamp(min=1)
        else:
            wanted[site] = 1.1 * pruned.sum(0)
    settings = {"density": 0.6, "window": 0.3, "scale": 1.1, "rank": WIDE}
    ours = merge(LORAS, name, seed=7, **settings)
    assert difference(ours.lora, wanted) < 1e-9


def test_della_without_a_window_is_dare():
    for name, like in (("della", "dare-ties"), ("della-linear", "dare-linear")):
        settings = {"density": 1.0, "scale": 0.7, "rank": WIDE}
        ours = merge(LORAS, name, window=0.0, **settings)
        assert difference(ours.lora, dense_changes(merge(LORAS, like, **settings).lora)) < 1e-12


def test_della_keeps_the_large_and_the_mean():
    """Large entries stay more often than small ones, and nothing is biased."""
    kept, mean = torch.zeros(2), torch.zeros_like(DENSE[0]["up"])
    change = DENSE[0]["up"]
    large = change.abs() > change.abs().median(dim=1, keepdim=True).values
    for seed in range(60):
        settings = {"density": 0.5, "window": 0.8, "rank": WIDE}
        sites = merge(LORAS[:1], "della-linear", seed=seed, **settings).lora.sites
        stayed = sites["up"].dense().abs() > 1e-9
        kept += torch.stack([stayed[large].double().mean(), stayed[~large].double().mean()])
        mean += sites["up"].dense() / 60
    assert float(kept[0] / 60) > 0.65
    assert float(kept[1] / 60) < 0.35
    assert float((mean - change).norm() / change.norm()) < 0.25


def test_della_refuses_chances_that_are_none():
    for settings in ({"density": 0.95}, {"density": 0.05}):
        with pytest.raises(SettingsError, match=r"chances from .* make the window narrower"):
            merge(LORAS, "della", **settings)


def wudi_loss(merged, site):
    return sum(
        float((((merged - dense[site]) @ dense[site].mT) ** 2).sum() / (dense[site] ** 2).sum())
        for dense in DENSE
    )


def test_wudi_is_adam_on_the_published_loss():
    """By autograd on whole matrices, from the sum."""
    wanted = {}
    for site in SITES:
        changes = torch.stack([dense[site] for dense in DENSE])
        merged = torch.nn.Parameter(changes.sum(dim=0))
        adam = torch.optim.Adam([merged], lr=1e-3)
        norms = (changes**2).sum((1, 2))
        for _ in range(40):
            products = (merged - changes) @ changes.mT
            loss = ((products**2).sum((1, 2)) / norms).sum()
            adam.zero_grad()
            loss.backward()
            adam.step()
        wanted[site] = merged.detach()
    ours = merge(LORAS, "wudi", steps=40, rate=1e-3, rank=WIDE)
    assert difference(ours.lora, wanted) < 1e-9
    assert difference(ours.lora, per_site(sum)) > 1e-3


def test_wudi_goes_to_its_closed_form():
    """Both reach the least loss, and agree on what the LoRAs' rows can tell."""
    closed = dense_changes(merge(LORAS, "wudi", solution="closed", rank=WIDE).lora)
    adam = dense_changes(merge(LORAS, "wudi", steps=1500, rate=5e-3, rank=WIDE).lora)
    for site in SITES:
        down = torch.cat([lora.sites[site].down for lora in LORAS])
        inside = torch.linalg.pinv(down) @ down  # onto the row spaces of all
        gap = (adam[site] - closed[site]) @ inside
        assert float(gap.norm() / closed[site].norm()) < 1e-2
        least, start = wudi_loss(closed[site], site), wudi_loss(per_site(sum)[site], site)
        assert wudi_loss(adam[site], site) - least < 1e-3 * (start - least)
        # By the normal equations, with a plain pseudoinverse.
        grams = [d[site].mT @ d[site] / (d[site] ** 2).sum() for d in DENSE]
        right = sum(d[site] @ gram for d, gram in zip(DENSE, grams, strict=True))
        plain = right @ torch.linalg.pinv(sum(grams), rtol=1e-10)
        torch.testing.assert_close(closed[site], plain, atol=1e-7, rtol=1e-7)


def test_wudi_leaves_what_does_not_disturb():
    """LoRAs with orthogonal rows stay as they are: the sum is the solution."""
    apart = [make_lora(seed, sites=("q",)) for seed in (1, 2)]
    basis = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64)).Q.mT
    for lora, rows in zip(apart, (basis[:2], basis[2:]), strict=True):
        lora.sites["q"].down.copy_(rows)
    total = sum(lora.sites["q"].dense() for lora in apart)
    for settings, most in (({"solution": "closed"}, 1e-9), ({}, 300 * 1e-5)):
        ours = merge(apart, "wudi", **settings).lora.sites["q"].dense()
        assert float((ours - total).abs().max()) <= most


def ace_densely(changes, ridge, uneven, leading, ranks):
    """As the source has it, on whole matrices; ``leading`` of the sum of the ranks."""
    width = changes[0].shape[1]
    traces = torch.stack([torch.trace(change.mT @ change) for change in changes])
    logs = traces.log()
    flag = bool(logs.var() / logs.mean() ** 2 > uneven)
    sigmas, right, total = [], 0, 0
    for change in changes:
        centred = change - change.mean(dim=0, keepdim=True)
        raw = centred.mT @ centred
        trace = torch.trace(raw)
        sigmas.append(raw / trace if flag else raw)
        padded = sigmas[-1] + (ridge / trace if flag else ridge) * torch.eye(width).double()
        right = right + centred @ padded
        total = total + padded
    prior = sum(sigmas).mean(dim=0, keepdim=True)
    if flag:
        prior = prior / traces.mean()
    merged = right @ torch.linalg.inv(total + prior)
    if flag:
        mean = total / len(changes)
        residual = sum(c @ (s - mean) for c, s in zip(changes, sigmas, strict=True))
        u, s, vt = torch.linalg.svd(residual + merged, full_matrices=False)
        count = max(1, int(leading * ranks))
        merged = merged + s[:count].mean() * u[:, :count] @ vt[:count]
    return merged, flag


@pytest.mark.parametrize("uneven", [0.3, 1e9])
@pytest.mark.parametrize("ridge", [1e-2, 1.0])
def test_ace_is_its_published_algorithm(uneven, ridge):
    loras = [make_lora(1, rank=2), make_lora(2, rank=3, size=0.3), make_lora(3, rank=2, size=2.0)]
    dense = [dense_changes(lora) for lora in loras]
    ours = merge(loras, "ace", uneven=uneven, ridge=ridge, rank=WIDE).lora
    flags = set()
    for site in SITES:
        wanted, flag = ace_densely([d[site] for d in dense], ridge, uneven, 0.3, 7)
        flags.add(flag)
        torch.testing.assert_close(ours.sites[site].dense(), wanted, atol=1e-7, rtol=1e-6)
    assert flags == ({False} if uneven == 1e9 else flags)
    if uneven == 0.3:
        assert True in flags


def test_ace_keeps_a_change_that_stands_alone():
    one, two = make_lora(1, sites=("q", "out")), make_lora(2, sites=("out", "up"))
    ours = merge([one, two], "ace").lora
    for lora, site in ((one, "q"), (two, "up")):
        assert torch.equal(ours.sites[site].dense(), lora.sites[site].dense())
    assert ours.sites["out"].rank <= 4
