"""Two merges at once, in two threads of one process, each on its own pipeline."""

import copy
import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from oracle import hooks_on
from pipelines import PIPELINES
from pipelines import two_concepts as loras_for
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.errors import BaseError
from iteris_core.hosts import diffusers_arguments
from iteris_core.hosts.diffusers import DiffusersHost

CALIBRATION = Calibration(samples=2, timesteps=1, latents="noise")


def merged(host) -> Lora:
    concepts = [Concept(random_lora(host, seed), prompts=["a dog", "a cat"]) for seed in (1, 2)]
    settings = {"steps": 2}
    return merge_loras(host, concepts, settings=settings, calibration=CALIBRATION).lora


def test_logging_is_as_it_was_after_two_studies_that_overlap(pipeline, caplog):
    """The first to begin is the first to end, and meanwhile other threads log."""
    begun, both = threading.Event(), threading.Barrier(3, timeout=60)

    def study(loop, calibration):
        begun.set()
        both.wait()
        logging.getLogger("diffusers.pipelines").error("of a trial")
        if threading.current_thread() is second:
            first.join()
        raise BaseError("studied")

    def studied():
        with pytest.raises(BaseError):
            diffusers_arguments.study(SimpleNamespace(), CALIBRATION)

    first, second = (threading.Thread(target=studied) for _ in range(2))
    with patch.object(diffusers_arguments, "_study", study), caplog.at_level("ERROR"):
        first.start()
        assert begun.wait(60)
        second.start()
        both.wait()
        logging.getLogger("own").error("of another thread")
        second.join()
    assert logging.root.manager.disable == 0
    logging.getLogger("own").error("afterwards")
    assert [record.message for record in caplog.records] == ["of another thread", "afterwards"]


@pytest.mark.slow
def test_merges_in_two_threads_give_what_one_alone_gives(pipeline):
    hosts = [DiffusersHost(copy.deepcopy(pipeline)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(merged, hosts))
    alone = merged(DiffusersHost(pipeline))
    for lora in found:
        for site, change in alone.sites.items():
            assert torch.equal(change.up, lora.sites[site].up), site


def of_thread():
    """What a merge may change in its thread, and must restore."""
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return *modes, torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()


def of_process():
    handlers = *logging.root.handlers, logging.lastResort
    filters = [list(handler.filters) for handler in handlers if handler is not None]
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    return filters, logging.root.manager.disable, dtype, precision


@pytest.mark.slow
def test_merges_in_pairs_under_load_are_those_one_after_another(tmp_path):
    """Of one class of pipeline, and of two; with their samples denoised, and measured."""
    calibration = Calibration(samples=2, timesteps=1, denoising_steps=2)
    names = "SD 1.5", "SD 3"
    hosts, pairs = [], [(0, 1), (0, 2), (1, 2), (2, 3)]
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        hosts.append(loras_for(PIPELINES[names[number // 2]](), folder))

    def merge(number):
        host, concepts = hosts[number]
        result = merge_loras(host, concepts, calibration=calibration)
        return result.lora.sites, result.report.kept, of_thread()

    thread, process = of_thread(), of_process()
    alone = [merge(number) for number in range(4)]
    hooks = [sum(map(hooks_on, host._models)) for host, _ in hosts]
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        with ThreadPoolExecutor(2) as pool:
            for turn in range(3 * len(pairs)):
                pair = pairs[turn % len(pairs)]
                for number, found in zip(pair, pool.map(merge, pair), strict=True):
                    sites, kept, after = found
                    assert kept == alone[number][1]
                    assert after == thread
                    for site, change in alone[number][0].items():
                        assert torch.equal(change.up, sites[site].up), site
                        assert torch.equal(change.down, sites[site].down), site
    finally:
        for other in load:
            other.kill()
            other.wait()
    assert of_process() == process
    assert [sum(map(hooks_on, host._models)) for host, _ in hosts] == hooks
