"""Two merges at once in one process, though ComfyUI runs one prompt after another."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from kit import SETTINGS


@pytest.mark.parametrize("count", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_they_give_what_one_after_another_gives(kit, count):
    """The same tensors, on one MODEL, while another thread keeps the processor busy; all that is
    the whole process's is as before."""
    import comfy.cli_args
    import comfy.model_management as memory

    def state():
        names = ("iteris_core", "nodes", "diffusers", "transformers", "comfy")
        loggers = [logging.getLogger(name) for name in (None, *names)]
        levels = [(one.level, one.disabled, one.propagate, len(one.handlers)) for one in loggers]
        args = vars(comfy.cli_args.args)
        off = getattr(memory, "in_training", None)
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()
        return levels, logging.root.manager.disable, dict(args), off, modes

    run = kit.node("merge_nodes", "IterisMerge").execute
    specs = kit.concepts()

    def merge(number):
        """One in four runs the model."""
        values = {**SETTINGS, "timesteps": 1, "latents": "noise", "rank": 2 + number % 3}
        given = {"clip": kit.clip, "samples": 2, "seed": number, "settings": values}
        method = "average" if number % 4 else "iteris"
        first = replace(specs[0], weight=1.0 + number)
        return run(kit.model, (first, specs[1]), method=method, **given).result[2]

    before, drawn = state(), kit.outputs()
    done = threading.Event()

    def busy():
        while not done.is_set():
            sum(range(10_000))

    load = threading.Thread(target=busy)
    load.start()
    try:
        with ThreadPoolExecutor(2) as both:
            at_once = list(both.map(merge, range(count)))
    finally:
        done.set()
        load.join()
    assert state() == before
    assert kit.unchanged(drawn)
    kit.forget()
    for number, found in enumerate(at_once):
        wanted = merge(number)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(tensor, found[key]) for key, tensor in wanted.items())
