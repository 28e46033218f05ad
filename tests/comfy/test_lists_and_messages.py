"""Lists of LoRAs that are sent once, files by any spelling, and messages that reveal nothing."""

from __future__ import annotations

import re

import pytest
from kit import SETTINGS, part, use_folders


@pytest.fixture
def loras(kit, monkeypatch):
    use_folders(monkeypatch, kit.folder, "loras")
    (kit.loras / "sub").mkdir()
    (kit.loras / "a.safetensors").rename(kit.loras / "sub" / "ä 'cat' <b>.safetensors")
    return kit.loras


def test_every_list_of_loras_has_every_name(pack, tmp_path, monkeypatch):
    """Programs that read /object_info, and not web/iteris.js, offer what it lists."""
    use_folders(monkeypatch, tmp_path, "loras")
    (tmp_path / "loras" / "one.safetensors").touch()
    nodes = {node.__name__: node.GET_NODE_INFO_V1()["input"] for node in part(pack, "nodes").NODES}
    inputs = {
        f"{name} {key}": str(given)
        for name, kinds in nodes.items()
        for kind in kinds.values()
        if isinstance(kind, dict)
        for key, given in kind.items()
        if re.fullmatch(r"lora_(name|low|\d+)", key)
    }
    assert len(inputs) == 12
    assert [key for key, given in inputs.items() if "one.safetensors" not in given] == []


@pytest.mark.parametrize(
    "name", ["sub/ä 'cat' <b>.safetensors", "sub\\ä 'cat' <b>.safetensors", "ä 'cat' <b>"]
)
def test_a_file_by_any_spelling(kit, loras, name):
    node = kit.node("concept_nodes", "IterisLoras")
    rows = {"lora_1": name, "lora_2": "gone.safetensors", "on_2": False}
    assert node.validate_inputs(**rows) is True
    assert node.fingerprint_inputs(**rows) == node.fingerprint_inputs(**rows)
    (spec,), words = node.execute(**rows).result
    assert spec.file.parent == loras / "sub"
    assert words == "sks cat"
    with pytest.raises(kit.core.IterisError, match=r"no LoRA gone\.safetensors in models/loras"):
        node.execute(**{**rows, "on_2": True})
    with pytest.raises(kit.core.IterisError, match="subjekt is no kind of prompts"):
        node.execute(**rows, prompts_1="subjekt")


def test_messages_name_no_folder_of_the_server(kit, loras):
    broken = loras / "sub" / "broken.safetensors"
    broken.write_bytes(b"<html>")
    with pytest.raises(kit.core.IterisError) as found:
        kit.node("concept_nodes", "IterisLoras").execute(lora_1="sub/broken.safetensors")
    assert str(found.value).startswith("sub/broken.safetensors")
    assert str(kit.folder) not in str(found.value)


def test_text_on_a_node_has_no_html(kit, loras, monkeypatch):
    shown: list[str] = []
    runtime = part(kit.pack, "nodes.comfy_runtime")
    monkeypatch.setattr(
        part(kit.pack, "nodes.concept_nodes"), "show_text",
        lambda text, _: shown.extend(runtime.ui_text(text)["text"]),
    )  # fmt: skip
    kit.node("concept_nodes", "IterisLoras").execute(lora_1="sub/ä 'cat' <b>.safetensors")
    assert shown == ["ä 'cat' ‹b› at 1: sks cat (a guess from its captions)"]


def test_a_linked_folder_keeps_its_name_in_the_recipe(kit, loras, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk")
    (loras / "b.safetensors").rename(elsewhere / "b.safetensors")
    (loras / "linked").symlink_to(elsewhere)
    found = kit.lora.ComfySites(kit.model, kit.clip).read_lora(loras / "linked" / "b.safetensors")
    assert found.source == "linked/b.safetensors"


def test_a_model_on_several_cards_is_refused(kit):
    model = kit.model.clone()
    model.set_additional_models("multigpu", [kit.model.clone()])
    with pytest.raises(kit.core.IterisError, match="several graphics cards"):
        kit.merge(on=(model, kit.clip))


def test_minutes_of_the_node_and_of_the_settings(kit):
    """The settings' count first; 0 is no limit."""
    request = part(kit.pack, "nodes.merge_settings").Request

    def minutes(**values):
        return request.of(values, kit.model).config([], "iteris").calibration.get("minutes")

    assert minutes(minutes=60.0) == 60
    assert minutes(minutes=60.0, settings={**SETTINGS, "minutes": 5.0}) == 5
    assert minutes(minutes=0.0, settings={"minutes": 0.0}) is None
    assert minutes(minutes=60.0, settings={"minutes": 0.0}) == 60
