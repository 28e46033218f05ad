"""The diffusers host on a real pipeline: rows, files and what the library makes of them."""

import pytest
import torch
from language_bases import largest_gap
from tiny import is_attention, random_lora

from iteris_core import Calibration, Concept, IterisError, Lora, LowRank, merge_loras, write_lora
from iteris_core.hosts.diffusers import DiffusersHost

PROMPTS = ["a dog", "a red dog on a table", "two dogs in the rain", "s1 dog", "dog and cat"]


def merged_concepts(host, **kwargs):
    return [
        Concept(random_lora(host, seed, **kwargs), prompts=PROMPTS, trigger=f"s{seed}")
        for seed in (1, 2)
    ]


CALIBRATION = Calibration(samples=4, timesteps=2, denoising_steps=3, seed=3)


def test_a_lora_of_the_text_encoder_alone_is_given_back(host):
    (concept, _) = merged_concepts(host, select=lambda site: site.startswith("text_encoder"))
    report = merge_loras(host, [concept], calibration=CALIBRATION).report
    assert report.kept["1"] == pytest.approx([1.0], abs=1e-3)


def test_values_that_do_not_fit_the_dtype_are_an_error_with_the_site(tmp_path):
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = Lora({site: LowRank(torch.full((4, 1), 1e12), torch.ones(1, 4))})
    with pytest.raises(IterisError, match=f"Site {site}.*write float32"):
        write_lora(lora, tmp_path / "a.safetensors", dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_without_a_text_encoder_is_an_error(pipeline):
    pipeline.text_encoder = None
    with pytest.raises(IterisError, match="has no text_encoder"):
        DiffusersHost(pipeline)


@pytest.mark.slow
def test_a_pipeline_that_passes_arguments_on_is_seeded_too(pipeline):
    """Its parent's ``__call__`` names what it takes."""

    class Own(type(pipeline)):
        def __call__(self, prompt=None, num_inference_steps=7, **others):
            return super().__call__(prompt, num_inference_steps=num_inference_steps, **others)

    pipeline.__class__ = Own
    host = DiffusersHost(pipeline)
    assert {"generator", "output_type", "height"} <= host._loop.names.keys()
    one, two = (
        merge_loras(host, merged_concepts(host, select=is_attention), calibration=CALIBRATION).lora
        for _ in range(2)
    )
    assert largest_gap(one, two) == 0
