"""The merge on a GPU: the same result as on the CPU, in float32 and in half precision."""

import copy
from dataclasses import replace

import pytest
import torch
from pipelines import PIPELINES
from pipelines.laws import Laws
from small_merge import GUIDED
from tiny import random_lora, two_concepts

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-3), (torch.float16, 5e-2)])
def test_the_gpu_gives_what_the_cpu_gives(host, dtype, limit):
    concepts = [Concept(random_lora(host, s), prompts=["a dog", "a cat"]) for s in (1, 2)]
    calibration = Calibration(samples=6, timesteps=2, latents="noise")
    settings = {"ridge": 1e-3}
    on_cpu = merge_loras(host, concepts, settings=settings, calibration=calibration)
    pipeline = copy.deepcopy(host.pipeline).to("cuda", dtype)
    on_gpu = merge_loras(
        DiffusersHost(pipeline), concepts, settings=settings, calibration=calibration
    )
    for site, change in on_cpu.lora.sites.items():
        found = on_gpu.lora.sites[site].dense().float().cpu()
        assert float((found - change.dense()).norm() / change.dense().norm()) < limit


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_a_limit_is_kept_on_the_device(host, share):
    """What the allocator rounds up is small beside a limit of hundreds of MiB."""
    host = DiffusersHost(copy.deepcopy(host.pipeline).to("cuda"))
    calibration = replace(GUIDED, samples=50, latent_size=64)

    def peak(limit):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        merge_loras(host, two_concepts(host), calibration=calibration, memory_budget=limit)
        return torch.cuda.max_memory_allocated() - before

    limit = round(share * peak(None))
    assert peak(limit) <= 1.05 * limit


@pytest.mark.parametrize("name", PIPELINES)
def test_three_laws_on_every_reduced_pipeline(name, tmp_path):
    reduced = PIPELINES[name]()
    reduced.pipeline.to("cuda")
    laws = Laws(reduced, tmp_path)
    assert laws.alone() < 1e-3
    rows, file = laws.rows_and_file()
    assert rows < 5e-3
    assert file < 1e-3
    assert laws.unchanged()
