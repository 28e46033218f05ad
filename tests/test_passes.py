"""Runs over several stages of a model."""

from __future__ import annotations

import torch
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora, merge_loras


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
