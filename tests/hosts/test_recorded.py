"""Calls of a denoiser as rows: taken apart, joined again, and nothing left on the model."""

import copy

import greenlet
import pytest
import torch
from pipelines import PIPELINES
from pipelines.loras import lora_tensors
from safetensors.torch import save_file
from torch import nn

from iteris_core import Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.recorded import recording, seen_by


class Denoiser(nn.Module):
    def forward(self, x, time, extra=None, **kwargs):
        return x + time


def test_a_call_is_seen_with_the_names_of_its_arguments_and_the_forward_comes_back():
    module = Denoiser()
    seen = []

    def see(name, call, run):
        seen.append((name, call))
        return run()

    with recording("unet", module), seen_by(see):
        assert float(module(torch.ones(1), 2, extra={"scale": 3}, more=4)) == 3.0
    assert "forward" not in module.__dict__
    ((name, call),) = seen
    assert name == "unet"
    assert call == {"x": call["x"], "time": 2, "extra.scale": 3, "more": 4}


def test_a_forward_that_was_put_there_before_is_put_back():
    """As offloading does."""
    module = Denoiser()
    own = module.__dict__["forward"] = lambda x, time: x * time
    with recording("unet", module), seen_by(lambda name, call, run: run()):
        assert float(module(torch.ones(1), 2)) == 2.0
    assert module.__dict__["forward"] is own


def test_forwards_that_wait_for_each_other_do_not_mix():
    module = Denoiser()
    seen: dict[str, list] = {"a": [], "b": []}

    def work(who: str) -> None:
        def see(name, call, run):
            seen[who].append(float(call["time"]))
            return run()

        with seen_by(see):
            greenlet.getcurrent().parent.switch()
            module(torch.ones(1), {"a": 1.0, "b": 2.0}[who])

    workers = [greenlet.greenlet(lambda who=who: work(who)) for who in ("a", "b")]
    with recording("unet", module):
        for _ in range(2):
            for worker in workers:
                worker.switch()
    assert seen == {"a": [1.0], "b": [2.0]}
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("at", ["denoising steps", "solving sites"])
def test_a_cancelled_merge_leaves_the_pipeline_as_it_was(at, tmp_path):
    reduced = PIPELINES["SD inpainting"]()
    pipeline = reduced.pipeline
    save_file(lora_tensors(pipeline, 1), tmp_path / "1.safetensors")
    host = DiffusersHost(pipeline, **reduced.call)
    concept = Concept(host.read_lora(tmp_path / "1.safetensors"), trigger="sks", class_word="cat")
    before = {name: value for name, value in pipeline.__dict__.items() if name[:1] != "_"}
    config, bars = copy.deepcopy(dict(pipeline.scheduler.config)), pipeline._progress_bar_config
    steps = pipeline.scheduler.num_inference_steps

    def tick(progress):
        if progress.what == at and progress.done:
            raise KeyboardInterrupt

    calibration = {"samples": 3, "timesteps": 2, "denoising_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        merge_loras(
            host, [concept], calibration=calibration, on_progress=tick, settings={"micro_batch": 2}
        )
    after = {name: value for name, value in pipeline.__dict__.items() if name[:1] != "_"}
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert dict(pipeline.scheduler.config) == config
    assert pipeline.scheduler.num_inference_steps == steps
    assert pipeline._progress_bar_config is bars
    assert not any("forward" in m.__dict__ or m._forward_hooks for m in pipeline.unet.modules())
