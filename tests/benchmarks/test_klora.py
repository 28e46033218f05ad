"""K-LoRA of the benchmarks: its choice by a transcription, and its run on a real pipeline."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tiny import random_lora

_FILE = Path(__file__).parents[2] / "benchmarks" / "klora.py"
_SPEC = importlib.util.spec_from_file_location("klora", _FILE)
klora = importlib.util.module_from_spec(_SPEC)
sys.modules["klora"] = klora
_SPEC.loader.exec_module(klora)


def plainly(first, second, progress, alpha, beta, wraps):
    """The sites that have the first LoRA, from whole matrices."""
    dense = {
        site: (first.sites[site].dense().double(), second.sites[site].dense().double())
        for site in first.sites
    }
    ratios = [float(one.abs().sum() / two.abs().sum()) for one, two in dense.values()]
    mean = sum(ratios) / len(ratios)
    near = [ratio for ratio in ratios if ratio < 3 * mean]
    gamma = sum(near) / len(near)
    scale = alpha * progress + beta
    if wraps:
        scale = scale % alpha
    taken = set()
    for site, (one, two) in dense.items():
        count = first.sites[site].rank * second.sites[site].rank
        sums = [m.abs().flatten().sort(descending=True).values[:count].sum() for m in (one, two)]
        if sums[0] / gamma / (sums[1] * scale) > 1:
            taken.add(site)
    return taken


def uneven(host):
    """Two LoRAs of which each is the larger one at some sites."""
    first, second = random_lora(host, 1), random_lora(host, 2)
    for i, site in enumerate(first.sites):
        first.sites[site].up.mul_(0.5 + (i % 7) / 4)
    return first, second


@pytest.mark.parametrize("scale", [klora.Scale(), klora.Scale.star(), klora.Scale(1.0, 0.2)])
def test_the_choice_is_by_the_largest_entries_and_the_step(host, scale):
    first, second = uneven(host)
    pair = klora.KLora(first, second, scale)
    counts = []
    for progress in (0.0, 0.3, 0.6, 0.9):
        chosen = pair.chosen(progress)
        of_first = {site for site, change in chosen.items() if change is first.sites[site]}
        plain = plainly(first, second, progress, scale.alpha, scale.beta, scale.wraps)
        assert of_first == plain
        assert chosen.keys() == first.sites.keys()
        counts.append(len(of_first))
    assert len(set(counts)) > 1  # the step decides too
    if not scale.wraps:
        assert counts == sorted(counts, reverse=True)  # more and more of the second


def test_a_site_of_one_lora_has_its_change(host):
    first, second = uneven(host)
    site = next(iter(first.sites))
    del second.sites[site]
    other = next(iter(second.sites))
    del first.sites[other]
    chosen = klora.KLora(first, second).chosen(1.0)
    assert chosen[site] is first.sites[site]
    assert chosen[other] is second.sites[other]


def test_every_step_runs_on_the_chosen_changes(host, pipeline):
    first, second = uneven(host)
    pair = klora.KLora(first, second)
    sites = host.sites()
    base = {site: sites[site].weight.detach().clone() for site in first.sites}
    steps = 4
    seen = []

    def note(module, args, output):
        progress = len(seen) % steps / steps
        wanted = pair.chosen(progress)
        for site, weight in base.items():
            changed = sites[site].weight.detach() - weight
            if site.startswith("text_encoder"):
                change = first.sites[site].dense() + second.sites[site].dense()
            else:
                change = wanted[site].dense()
            torch.testing.assert_close(
                changed, change.reshape(weight.shape).to(weight), atol=1e-5, rtol=1e-4
            )
        seen.append(progress)

    handle = host.pipeline.unet.register_forward_hook(note)
    with klora.k_lora(pair, sites, host.pipeline.unet, steps):
        for _ in range(2):
            host.pipeline("a b", num_inference_steps=steps, output_type="latent", height=8, width=8)
    handle.remove()
    assert seen == [0, 0.25, 0.5, 0.75] * 2
    assert all(torch.equal(sites[site].weight, weight) for site, weight in base.items())


def test_weights_are_put_back_after_an_error(host):
    first, second = uneven(host)
    sites = host.sites()
    base = {site: sites[site].weight.detach().clone() for site in first.sites}

    def fail():
        with klora.k_lora(klora.KLora(first, second), sites, host.pipeline.unet, 4):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert all(torch.equal(sites[site].weight, weight) for site, weight in base.items())
    assert not host.pipeline.unet._forward_pre_hooks
