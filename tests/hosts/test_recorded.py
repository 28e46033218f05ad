"""Calls of a denoiser as rows: taken apart, joined again, and nothing left on the model."""

import copy

import pytest
from pipelines import PIPELINES
from pipelines.loras import lora_tensors
from safetensors.torch import save_file

from iteris_core import Concept, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost


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
