"""Two merges at once, in two threads of one process, each on its own pipeline."""

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost

CALIBRATION = Calibration(samples=2, timesteps=1, latents="noise")


def merged(host) -> Lora:
    concepts = [Concept(random_lora(host, seed), prompts=["a dog", "a cat"]) for seed in (1, 2)]
    settings = {"block_steps": 2}
    return merge_loras(host, concepts, settings=settings, calibration=CALIBRATION).lora


def test_merges_in_two_threads_give_what_one_alone_gives(pipeline):
    hosts = [DiffusersHost(copy.deepcopy(pipeline)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(merged, hosts))
    alone = merged(DiffusersHost(pipeline))
    for lora in found:
        for site, change in alone.sites.items():
            assert torch.equal(change.up, lora.sites[site].up), site
