"""Modular diffusers pipelines, in addition to the laws for every class."""

import torch
from command_line import QUICK
from pipelines import PIPELINES, draw, two_concepts, write_lora
from safetensors import safe_open

from iteris_core import merge_loras
from iteris_core.hosts.diffusers_loop import progress_bars

CALIBRATION = {"samples": 4, "timesteps": 2, "denoising_steps": 3}


def merged(reduced, folder):
    host, concepts = two_concepts(reduced, folder)
    return merge_loras(host, concepts, calibration=CALIBRATION, unmergeable="skip").lora


def test_the_pipeline_is_as_it_was(tmp_path):
    reduced = PIPELINES["Anima"]()
    pipeline = reduced.pipeline
    bars = list(progress_bars(pipeline))
    settings = [dict(bar._progress_bar_config) for bar in bars]
    parts = dict(pipeline.components)
    scale, drawn = pipeline.guider.guidance_scale, draw(reduced)
    assert merged(reduced, tmp_path).sites
    assert all(pipeline.components[name] is part for name, part in parts.items())
    assert pipeline.guider.guidance_scale == scale
    assert [bar._progress_bar_config for bar in bars] == settings
    assert torch.equal(draw(reduced), drawn)


def test_a_folder_on_the_command_line(tmp_path, iteris):
    reduced = PIPELINES["Anima"]()
    reduced.pipeline.save_pretrained(str(tmp_path / "anima"))
    output = tmp_path / "m.safetensors"
    arguments = ["merge", tmp_path / "anima", "--output", output, *QUICK, "--latent-size=8"]
    for number in (1, 2):
        file = write_lora(tmp_path / f"{number}.safetensors", reduced.pipeline, number)
        arguments += ["--concept", f"{file}:sks{number}:cat"]
    assert "ComponentsManager" in iteris.refused(*arguments, "--offload=model")
    assert not output.exists()
    iteris(*arguments)
    with safe_open(output, "pt") as file:
        assert any("text_conditioner" in key for key in file.keys())  # noqa: SIM118
