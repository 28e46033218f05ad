"""All strategies for a sweep agree on every class of model, bit for bit."""

import pytest
import torch
from pipelines import PIPELINES, write_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.host_pool import HostPool
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.passes import sweep
from iteris_core.passes.planner import Plan, Strategy, find, replayable
from iteris_core.solve.choose import THRESHOLDS, Thresholds

CPU = torch.device("cpu")
FAST = ("SD inpainting", "FLUX.1 Kontext", "Wan 2.2 with two experts")


def planned_as(most, offloads, replayed=None, bits=None):
    """In place of a plan: with blocks of so many barriers (None: pausing at every site)."""

    def planned(run, stage, _, batching, **__):
        if most is None or not stage.sites:
            return Plan(stage, batching.rows, Strategy())
        barriers = replayable(stage, run.lockstep, find(stage, run.lockstep).barriers(most))
        if replayed is not None:
            replayed.extend(barriers.blocks)
        strategy = Strategy(barriers=barriers, offloads=offloads, bits=bits)
        return Plan(stage, batching.rows, strategy, host_limit=1 << 30)

    return planned


class Recorded(HostPool):
    """Says whether all that waited was freed when it was given back."""

    freed = False

    def close(self) -> None:
        self.freed = all(slab._gaps == [(0, len(slab._memory))] for slab in self._slabs)
        super().close()


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PIPELINES]
)
def test_all_ways_agree_on_every_class(name, tmp_path, monkeypatch):
    reduced = PIPELINES[name]()
    host = DiffusersHost(reduced.pipeline, **reduced.call)
    concepts = []
    for seed in (1, 2):
        lora = host.read_lora(write_lora(tmp_path / f"{seed}.safetensors", reduced.pipeline, seed))
        concepts.append(Concept(lora, prompts=list(reduced.prompts)))
    places, replayed = [], []

    def place(*args):
        places.append(Recorded(*args))
        return places[-1]

    monkeypatch.setattr(sweep, "HostPool", place)

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
            assert memory.freed
        for site, change in wanted.items():
            assert torch.equal(change.up, found[site].up), site
            assert torch.equal(change.down, found[site].down), site
