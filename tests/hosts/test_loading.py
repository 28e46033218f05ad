"""A merge that is loaded into a pipeline draws what its changes draw, or the error says in which
file it is."""

import copy
import re
import tempfile
from pathlib import Path

import pytest
import torch
from bases import make_lora, tiny, trained_sites
from pipelines import PIPELINES, applied, draw, two_concepts

from iteris_core import Concept, IterisError, merge_loaded, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.diffusers_lora import peft_layers
from iteris_core.lora_files.experts import joined_experts

pytestmark = pytest.mark.usefixtures("unmeasured")

WAN = "Wan 2.2 with two experts"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("SDXL", "SD 3", "Z-Image")]
NAMES = ["FLUX.1", "Qwen-Image", WAN, *SLOW]
QUICK = {"samples": 2, "timesteps": 2, "denoising_steps": 2}


def assert_draws(reduced, lora, drawn):
    """``drawn`` is what the pipeline draws with the changes of ``lora`` in its weights."""
    reduced.pipeline.unload_lora_weights()
    base = draw(reduced)
    with applied(reduced.pipeline, lora):
        wanted = draw(reduced)
    assert float((drawn - wanted).norm() / (wanted - base).norm()) < 1e-4
    assert float((wanted - base).norm() / base.norm()) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_adapters_of_every_pipeline_are_merged_and_loaded(name, tmp_path):
    reduced = PIPELINES[name]()
    pipeline, (host, concepts) = reduced.pipeline, two_concepts(reduced, tmp_path)
    for number in (1, 2):
        file, adapter = str(tmp_path / f"{number}.safetensors"), f"lora-{number}"
        pipeline.load_lora_weights(file, adapter_name=adapter)
        if host.experts:
            pipeline.load_lora_weights(file, adapter_name=adapter, load_into_transformer_2=True)
    pipeline.set_adapters(["lora-1", "lora-2"], [0.7, 1.2])
    words = {f"lora-{number}": list(reduced.prompts) for number in (1, 2)}
    result = merge_loaded(pipeline, words, call=reduced.call, calibration=QUICK)
    assert pipeline.get_active_adapters() == ["merged"]
    assert_draws(reduced, result.lora, draw(reduced))
    for one in (merge_loras(None, concepts[:1], "sum"), result, result):  # each replaces another
        one.load_into(pipeline)
    assert pipeline.get_active_adapters() == ["iteris"]
    assert_draws(reduced, result.lora, draw(reduced))


def in_file(error, base) -> dict[str, torch.Tensor]:
    """The changes in the file that the error names."""
    path = re.search(r"The merge is not lost: it is in (.*\.safetensors)\.$", str(error.value))
    assert path is not None, error.value
    lora = DiffusersHost(base).read_lora(Path(path[1]))
    return {site: change.dense() for site, change in lora.sites.items()}


def assert_same(found, lora):
    assert found.keys() == lora.sites.keys()
    for site, change in lora.sites.items():
        torch.testing.assert_close(found[site], change.dense())


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where the system has its temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_pipeline_does_not_load_in_full_is_in_a_file(place):
    """diffusers drops T5. The adapters are then as before."""
    pipeline = copy.deepcopy(tiny("sd3"))
    lora = make_lora("sd3")
    result = merge_loras(None, [Concept(lora, trigger="sks")], "sum")
    few = [site for site in trained_sites("sd3") if ".attn.to_" in site]
    for seed in (2, 3):
        other = merge_loras(None, [Concept(make_lora("sd3", few, seed), trigger="sks")], "sum")
        other.load_into(pipeline, f"other-{seed}")
    pipeline.set_adapters(["other-2", "other-3"], [0.5, 2.0])
    before = adapters_of(pipeline)
    with pytest.raises(
        IterisError, match=r"loads \d+ of the LoRA's \d+ .* text_encoder_3\."
    ) as bad:
        result.load_into(pipeline)
    assert_same(in_file(bad, tiny("sd3")), lora)
    assert adapters_of(pipeline) == before
    assert sorted(path.suffix for path in place.rglob("*") if path.is_file()) == [".safetensors"]


def adapters_of(pipeline):
    layers = peft_layers(pipeline.transformer).items()
    return {n: (dict(layer.scaling), layer.active_adapters) for n, layer in layers if layer.scaling}


def test_a_merge_of_two_experts_is_saved_in_two_files(tmp_path):
    reduced = PIPELINES[WAN]()
    host, concepts = two_concepts(reduced, tmp_path)
    result = merge_loras(None, concepts, "average")
    path = result.save(tmp_path / "both.safetensors", dtype="float32")
    assert path.name == "both_high_noise.safetensors"
    low = host.read_lora(tmp_path / "both_low_noise.safetensors")
    again = joined_experts(host.read_lora(path), low, host.experts)
    assert_same({site: change.dense() for site, change in again.sites.items()}, result.lora)
