"""LoRAs that are no subject, by their names: what is found, and what only sounds like one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iteris_core import Concept
from iteris_core.lora import Lora, LowRank
from iteris_core.lora_files.metadata import purpose_of
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
        ("AgeSlider_v2.safetensors", "slider"),
        ("add_detail.safetensors", "detailer"),
        ("Detail Tweaker XL.safetensors", "detailer"),
        ("ghibli_style_offset.safetensors", "style"),
        ("PaperArtStyle.safetensors", "style"),
        ("lifestyle_blogger.safetensors", None),
        ("bob_hair_style.safetensors", None),
        ("detailed_ornament.safetensors", None),
        ("distillery.safetensors", None),
        ("undistilled_look.safetensors", None),
    ],
)
def test_purpose_by_name(name, purpose):
    assert purpose_of(name, {}) == purpose


def test_purpose_by_what_the_file_calls_itself():
    assert purpose_of("v2.safetensors", {"ss_output_name": "sdxl_lightning_v2"}) == "speed"
    assert purpose_of("v2.safetensors", {"ss_sd_model_name": "sdxl_lightning.safetensors"}) is None
    assert purpose_of("turbo.safetensors", {"modelspec.title": "Ink style"}) == "style"


@pytest.mark.parametrize(
    ("name", "purpose"),
    [
        ("lightning_ff13", None),
        ("porsche_911_turbo", None),
        ("Lightning_McQueen", None),
        ("lightning_style", "style"),
        ("sdxl_lightning_4step", "speed"),
        ("lcm_sdv1-5", "speed"),
    ],
)
def test_a_name_with_a_word_for_speed_and_a_phrase_of_its_own_is_no_speed_lora(
    tmp_path, name, purpose
):
    """Wherever the phrase is: in the file, in a note beside it, or given."""
    file, phrase = tmp_path / f"{name}.safetensors", "lightning farron"
    of_file = Concept(file=file).with_found_words({"modelspec.trigger_phrase": phrase})
    lora = Lora({}, source=file.name)
    given = replace(Concept(file=file, trigger=phrase).with_found_words({}), lora=lora)
    (tmp_path / f"{name}.civitai.info").write_text(json.dumps({"trainedWords": [phrase]}))
    of_note = Concept(file=file).with_found_words({})
    always_on = "include" if purpose == "speed" else "no"
    assert [of_file.always_on, of_note.always_on] == [always_on] * 2
    said = [] if purpose == "speed" else [phrase]
    assert list(of_file.phrases) == list(of_note.phrases) == said
    assert ("is speed" in str(notes_of([given]))) == (purpose == "speed")


@pytest.mark.parametrize(
    ("metadata", "tags", "purpose"),
    [
        ({"ss_sd_model_name": "ponyDiffusionV6XL.safetensors"}, (), "tags"),
        ({"ss_tag_frequency": '{"10_x": {"1girl": 20, "mychar": 20}}'}, (), "tags"),
        ({"ss_tag_frequency": '{"10_x": {"a dog on grass": 1, "sks dog": 20}}'}, (), None),
        ({"ss_sd_model_name": "noobAI.safetensors"}, ("anime", "style"), "style"),
        ({"ss_sd_model_name": "sd_xl_base_1.0.safetensors"}, ("character",), None),
    ],
)
def test_purpose_by_training_and_notes(metadata, tags, purpose):
    assert purpose_of("x.safetensors", metadata, tags) == purpose


@pytest.mark.parametrize(
    ("name", "given", "seen"),
    [
        ("age_slider", {}, {"always_on": "include", "phrases": []}),
        ("age_slider", {"trigger": "old"}, {"always_on": "no", "phrases": ["old"]}),
        ("age_slider", {"always_on": "no"}, {"always_on": "no", "phrases": ["sks dog"]}),
        ("ink_style", {}, {"kind": "style", "phrases": ["sks dog"]}),
        ("ink_style", {"trigger": "ink"}, {"kind": "style", "phrases": ["ink"]}),
        ("ink_style", {"kind": "subject"}, {"kind": "subject", "phrases": ["sks dog"]}),
        ("ink_style", {"prompts": ["a"]}, {"kind": "style", "phrases": []}),
        ("sks", {}, {"kind": "subject", "always_on": "no", "phrases": ["sks dog"]}),
    ],
)
def test_what_is_not_set_comes_from_the_file(name, given, seen):
    """The same for a concept in a file and for one whose LoRA is read."""
    metadata = {"modelspec.trigger_phrase": "sks dog"}

    class Reader:
        def read_lora(self, path):
            return Lora({}, source=str(path), metadata=metadata)

    config = Concept(file=Path(f"{name}.safetensors"), **given).with_found_words(metadata)
    for concept in config, Concept.from_file(Reader(), f"{name}.safetensors", **given):
        assert {key: getattr(concept, key) for key in seen} == seen


def test_a_merged_lora_is_not_what_one_of_its_loras_was():
    recipe = {"concepts": [{"lora": "cat", "trigger": "sks", "class": "cat"}]}
    metadata = {"modelspec.title": "cat + lightning_4step", "iteris": json.dumps(recipe)}
    config = Concept(file=Path("cat_style.safetensors")).with_found_words(metadata)
    assert (config.kind, config.always_on, config.phrases) == ("subject", "no", ["sks cat"])


def test_notes_beside_a_file_tell_its_kind(tmp_path):
    (tmp_path / "x.metadata.json").write_text('{"tags": ["Style", "ink"]}')
    config = Concept(file=tmp_path / "x.safetensors")
    found = config.with_found_words({})
    assert found.kind == "style"
    (note,) = notes_of([replace(found, lora=Lora({}, source=str(found.file)))]).values()
    assert "the kind of this LoRA is style" in note[0]
    (tmp_path / "x.metadata.json").write_text('{"tags": 3, "model": {"tags": [{}, null]}}')
    assert config.with_found_words({}).kind == "subject"


def test_such_a_concept_is_pointed_out():
    change = LowRank(torch.ones(2, 1), torch.ones(1, 2))
    speed, cat = (
        Concept(Lora({"unet.a": change}, source=source), trigger=trigger)
        for source, trigger in (("sdxl_lightning_4step.safetensors", "x"), ("cat.safetensors", "y"))
    )
    notes = notes_of([speed, cat])
    assert set(notes) == {"x"}
    assert "is speed. Mark it as always on" in notes["x"][0]
    merged = Concept(Lora({"unet.a": change}, source="lcm.safetensors", metadata={"iteris": "{}"}))
    assert notes_of([merged]) == {}
