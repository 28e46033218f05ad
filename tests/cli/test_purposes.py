"""Speed and edit LoRAs by their names: what is found, and what only sounds like one."""

from __future__ import annotations

import pytest
import torch

from iteris_core import Concept
from iteris_core.lora import Lora, LowRank
from iteris_core.lora_files.metadata import is_fast, purpose_of
from iteris_core.report.provenance import notes_of


@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        ("sdxl_lightning_4step_lora.safetensors", "speed"),
        ("Qwen-Image-Lightning-8steps-V1.0.safetensors", "speed"),
        ("pytorch_lora_lcm_sdv1-5.safetensors", "speed"),
        ("Hyper-SDXL-8steps-lora.safetensors", "speed"),
        ("FLUX.1-Turbo-Alpha.safetensors", "speed"),
        ("dmd2_sdxl_4step_lora.safetensors", "speed"),
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors", "speed"),
        ("flux1-kontext-relight.safetensors", "edit"),
        ("instruct-pix2pix-lora.safetensors", "edit"),
        ("my_cat.safetensors", None),
        ("hyperrealistic_skin.safetensors", None),
        ("hyper_detail.safetensors", None),
        ("cat_z_image_turbo.safetensors", None),
        ("cat-zimage-turbo-000010.safetensors", None),
        ("jane_qwen_image_edit_2509.safetensors", None),
        ("sks_cat_1000steps.safetensors", None),
        ("credits.safetensors", None),
    ],
)
def test_purpose_by_name(name, purpose):
    assert purpose_of(name, {}) == purpose


def test_purpose_by_what_the_file_calls_itself():
    assert purpose_of("v2.safetensors", {"ss_output_name": "sdxl_lightning_v2"}) == "speed"
    assert purpose_of("v2.safetensors", {"ss_sd_model_name": "sdxl_lightning.safetensors"}) is None


def test_fast_bases():
    assert is_fast(["vae.safetensors", "z_image_turbo_bf16.safetensors"]) == (
        "z_image_turbo_bf16.safetensors"
    )
    assert is_fast(["flux1-schnell.safetensors"])
    assert is_fast(["turbo/qwen_image.safetensors", "sd_xl_base_1.0.safetensors"]) == ""


def test_such_a_concept_is_pointed_out():
    change = LowRank(torch.ones(2, 1), torch.ones(1, 2))
    speed, cat = (
        Concept(Lora({"unet.a": change}, source=source), trigger=trigger)
        for source, trigger in (("sdxl_lightning_4step.safetensors", "x"), ("cat.safetensors", "y"))
    )
    notes = notes_of([speed, cat])
    assert set(notes) == {"x"}
    assert "draw in few steps" in notes["x"][0]
    merged = Concept(Lora({"unet.a": change}, source="lcm.safetensors", metadata={"iteris": "{}"}))
    assert notes_of([merged]) == {}
