"""Two merges at once, in two threads of one process, each on its own pipeline."""

import copy
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from tiny import random_lora

from iteris_core import Calibration, Concept, Lora, merge_loras
from iteris_core.errors import BaseError
from iteris_core.hosts import diffusers_arguments
from iteris_core.hosts.diffusers import DiffusersHost

CALIBRATION = Calibration(samples=2, timesteps=1, latents="noise")


def merged(host) -> Lora:
    concepts = [Concept(random_lora(host, seed), prompts=["a dog", "a cat"]) for seed in (1, 2)]
    settings = {"block_steps": 2}
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


def test_merges_in_two_threads_give_what_one_alone_gives(pipeline):
    hosts = [DiffusersHost(copy.deepcopy(pipeline)) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(merged, hosts))
    alone = merged(DiffusersHost(pipeline))
    for lora in found:
        for site, change in alone.sites.items():
            assert torch.equal(change.up, lora.sites[site].up), site
