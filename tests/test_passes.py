"""Runs over several stages of a model."""

from __future__ import annotations

import torch
from oracle import SITES, ModuleHost, Net, hooks_on, make_data, make_lora
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.hosts.protocol import Stage


def test_stages_do_not_share_inputs(host):
    """Changes of the text encoder that do nothing do nothing to the UNet's sites."""
    calibration = Calibration(samples=2, timesteps=1, latents="noise")

    def concepts(with_text: bool):
        def chosen(site: str) -> bool:
            text = site.endswith(("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"))
            return site.endswith("attn1.to_q") or (with_text and text)

        for seed in (1, 2):
            sites = random_lora(host, seed, select=chosen).sites
            unet = random_lora(host, seed, select=lambda site: site.endswith("attn1.to_q")).sites
            yield Concept(
                Lora({site: unet.get(site, c.scaled(0.0)) for site, c in sites.items()}),
                trigger=f"t{seed}",
            )

    def merge(with_text: bool):
        return merge_loras(
            host, list(concepts(with_text)), "regmean", calibration=calibration
        ).lora.sites

    alone, together = merge(False), merge(True)
    for site, change in alone.items():
        torch.testing.assert_close(together[site].dense(), change.dense())


class HeadedNet(Net):
    """A site-less head behind the last site, which counts the rows that reach it."""

    rows = 0

    def forward(self, x):
        y = super().forward(x)
        self.rows += len(y)
        return y


class TwoStages(ModuleHost):
    """The module as a stage that feeds another, which has no sites."""

    def stages(self, samples, sites):
        (stage,) = super().stages(samples, sites)
        yield Stage(stage.name, stage.sites, stage.owners, stage.run, feeds=True)
        yield Stage("rest", [], [0], lambda rows, copies: None)


def test_a_sweep_stops_behind_the_last_site_unless_a_later_stage_needs_the_output():
    concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]
    settings = {"statistics": "float64", "micro_batch": 5}
    alone, feeding = (kind(HeadedNet(), make_data()) for kind in (ModuleHost, TwoStages))
    first, second = (
        merge_loras(host, concepts, settings=settings, memory_budget=None)
        for host in (alone, feeding)
    )
    assert alone.model.rows == 0
    assert feeding.model.rows == 2 * 12
    assert hooks_on(alone.model) == 0
    for site in SITES:
        assert torch.equal(first.lora.sites[site].dense(), second.lora.sites[site].dense())
