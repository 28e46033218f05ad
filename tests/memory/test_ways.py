"""All strategies for a sweep agree, bit for bit, on models of each kind of block."""

import pytest
import torch
from forced_plans import CPU, planned_as, recorded_pools
from pipelines import PIPELINES, write_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes import sweep
from iteris_core.solve.choose import THRESHOLDS, Thresholds

pytestmark = pytest.mark.usefixtures("unmeasured")

FAST = "Wan 2.2 with two experts"
SLOW = ("SD 1.5", "SDXL", "SD 3", "FLUX.1 Kontext", "Qwen-Image-Edit", "LTX-2", "Lumina 2", "Sana",
        "ACE-Step 1.5")  # fmt: skip
"""UNets, blocks with one stream and with two, gated ones, pictures beside prompts, convolutions in
blocks, sound. That each class replays what it computes is ``tests/hosts/test_pipelines.py``."""


@pytest.mark.parametrize(
    "name", [FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_all_ways_agree(name, tmp_path, monkeypatch):
    reduced = PIPELINES[name]()
    host = DiffusersHost(reduced.pipeline, **reduced.call)
    concepts = []
    for seed in (1, 2):
        lora = host.read_lora(write_lora(tmp_path / f"{seed}.safetensors", reduced.pipeline, seed))
        concepts.append(Concept(lora, prompts=list(reduced.prompts)))
    places, replayed = recorded_pools(monkeypatch), []

    def merged(most, offloads):
        monkeypatch.setattr(sweep, "planned", planned_as(most, offloads, replayed))
        return merge_loras(
            host,
            concepts,
            settings={"micro_batch": 5, **reduced.settings},
            thresholds=Thresholds(sample_rows=3),
            calibration=Calibration(samples=4, timesteps=2, denoising_steps=3, seed=3),
            unmergeable="skip",
        ).lora.sites

    wanted = merged(None, None)
    sweeps = reduced.settings.get("schedule") != "jacobi"
    for most, offloads in ((0, CPU), (THRESHOLDS.blocks[0], None), (THRESHOLDS.blocks[1], CPU)):
        places.clear()
        replayed.clear()
        found = merged(most, offloads)
        assert bool(replayed) == bool(most)
        assert bool(places) == (sweeps and offloads is not None)
        for memory in places:
            assert memory.moved > 0
            assert memory.left == 0
        for site, change in wanted.items():
            assert torch.equal(change.up, found[site].up), site
            assert torch.equal(change.down, found[site].down), site
