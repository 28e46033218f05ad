"""Three laws on a reduced pipeline of every class: the merge of one LoRA draws what its file draws,
rows may share a forward as they like, and the written file draws what the merge draws."""

import diffusers
import pytest
from architecture_results import record
from pipelines import PIPELINES, write_lora
from pipelines.laws import CALIBRATION, Laws
from pipelines.reduced import seeded
from pipelines.stable_diffusion import sd_controlnet

from iteris_core import Concept, IterisError, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost

ALONE, ROWS, FILE = 1e-3, 5e-3, 1e-3
FAST = "Wan 2.2 with two experts", "Qwen-Image 2.1", "Anima"
"""Experts with frames, no tokenizer, and blocks; the others are slow tests."""

NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in PIPELINES]


@pytest.mark.parametrize("name", NAMES)
def test_three_laws(name, tmp_path):
    laws = Laws(PIPELINES[name](), tmp_path)
    alone = laws.alone()
    rows, file = laws.rows_and_file()
    figures = {"alone": alone, "rows": rows, "file": file, "drift": laws.drift}
    if laws.left_out:
        figures["left_out"] = laws.left_out
    if laws.reduced.settings:
        figures["settings"] = ", ".join(f"{n}={v}" for n, v in laws.reduced.settings.items())
    record("diffusers", name, diffusers.__version__, **figures)
    assert (alone < ALONE, rows < ROWS, file < FILE) == (True,) * 3, figures
    assert laws.kept == pytest.approx([1.0] * 4, abs=1e-6)
    assert laws.unchanged()


def test_layers_that_run_twice_are_refused_before_anything_runs(tmp_path):
    reduced = PIPELINES["CogView 4"]()
    host = DiffusersHost(reduced.pipeline, **reduced.call)
    lora = host.read_lora(write_lora(tmp_path / "1.safetensors", reduced.pipeline))
    twice = [site for site in lora.sites if ".ff." in site]
    with pytest.raises(IterisError, match=rf"{len(twice)} sites, such as .*\.ff\..*jacobi"):
        merge_loras(host, [Concept(lora, prompts=["a dog"])], calibration=CALIBRATION)


def test_a_control_net_is_refused_before_anything_runs(tmp_path):
    reduced = seeded(sd_controlnet)()
    host = DiffusersHost(reduced.pipeline, **reduced.call)
    lora = host.read_lora(write_lora(tmp_path / "1.safetensors", reduced.pipeline))
    with pytest.raises(IterisError, match=r"ControlNetPipeline gives.*down_block.*without it"):
        merge_loras(host, [Concept(lora, prompts=["a dog"])], calibration=CALIBRATION)


def test_a_class_that_nothing_names(tmp_path):
    """Tomorrow's: of other names than today's, and of no architecture that is known."""
    reduced = PIPELINES["Qwen-Image"]()
    for thing in (reduced.pipeline, reduced.pipeline.transformer):
        thing.__class__ = type("Tomorrow", (type(thing),), {})
    laws = Laws(reduced, tmp_path)
    assert laws.alone() < ALONE
    rows, file = laws.rows_and_file()
    assert (rows < ROWS, file < FILE) == (True, True)
