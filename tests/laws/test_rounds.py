"""Gradient fusion and LoRACLR in rounds: as if what was merged before were in the base."""

import copy
from dataclasses import replace

import pytest
import torch
from bases import make_lora, tiny
from rivals.rounds import reads_text

from iteris_core import Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost

CALIBRATION = {"samples": 2, "timesteps": 1, "denoising_steps": 2, "latent_size": 8, "seed": 3}
SETTINGS = {"gradient-fusion": {"steps": 4, "text_steps": 4}, "loraclr": {"steps": 4, "rate": 1e-2}}
PARTS = ("q_proj", "attn1.to_q", "attn2.to_k", "attn2.to_v", "ff.net.2")


def of_round(number, site):
    encoder = site.startswith("text_encoder")
    return (encoder, reads_text(site) and not encoder, not reads_text(site))[number]


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", SETTINGS)
def test_each_round_is_a_merge_on_a_base_with_those_before(name):
    base = copy.deepcopy(tiny("sd1"))
    sites = tuple(site for site in DiffusersHost(base).sites() if site.endswith(PARTS))
    loras = [make_lora("sd1", sites, seed) for seed in (1, 2)]

    def merged(loras, latents="denoising"):
        concepts = [
            Concept(lora, trigger=f"s{i}", class_word="dog") for i, lora in enumerate(loras)
        ]
        calibration = {**CALIBRATION, "latents": latents}
        host = DiffusersHost(base)
        return merge_loras(
            host, concepts, name, settings=SETTINGS[name], calibration=calibration
        ).lora

    whole = merged(loras).sites
    assert set(whole) == set(sites)
    for number, latents in enumerate(("noise", "noise", "denoising")):
        part = [s for s in sites if of_round(number, s)]
        some = [replace(lora, sites={s: lora.sites[s] for s in part}) for lora in loras]
        alone = merged(some, latents).sites
        modules = DiffusersHost(base).sites()
        for site in part:
            torch.testing.assert_close(
                whole[site].dense(), alone[site].dense(), atol=2e-5, rtol=1e-3
            )
            weight = modules[site].weight
            weight.data += alone[site].dense().reshape(weight.shape)
