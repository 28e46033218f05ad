"""Lists of LoRAs that are sent once, files by any spelling, and messages that reveal nothing."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from kit import SETTINGS, part, use_folders
from safetensors.torch import load_file, save_file


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
    assert str(found.value).startswith("Row 1: sub/broken.safetensors")
    assert str(kit.folder) not in str(found.value)


def test_text_on_a_node_goes_to_who_runs_it(kit, loras, monkeypatch):
    """As it is: the page makes it text. A prompt without a page tells nobody."""
    sent: list[tuple] = []
    page = SimpleNamespace(
        client_id="me", last_prompt_id="p", send_sync=lambda *one: sent.append(one)
    )
    monkeypatch.setitem(
        sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=page))
    )
    node = kit.node("concept_nodes", "IterisLoras")
    node.hidden.unique_id = "1"
    node.execute(lora_1="b.safetensors", words_1="<b>*x*")
    text = "b at 1: <b>*x*"
    assert sent == [("iteris.text", {"node": "1", "prompt_id": "p", "text": text}, "me")]
    page.client_id = None
    node.execute(lora_1="b.safetensors", words_1="<b>*x*")
    assert len(sent) == 1
    assert part(kit.pack, "nodes.comfy_runtime").ui_text(text) == {"text": [text]}


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
    """0 is no limit; those that IterIS Settings had in earlier versions do not count."""
    request = part(kit.pack, "nodes.merge_settings").Request

    def minutes(**values):
        return request.of(values, kit.model).config([], "iteris").calibration.get("minutes")

    assert minutes(minutes=60.0) == 60
    assert minutes(minutes=0.0) is None
    assert minutes(minutes=60.0, settings={**SETTINGS, "minutes": 5.0}) == 60
    nodes = {node.define_schema().node_id: node for node in part(kit.pack, "nodes").NODES}
    assert "minutes" not in {i.id for i in nodes["IterisSettings"].define_schema().inputs}


def test_few_inputs_stand_out(pack):
    """The others are advanced: newer front ends fold them away."""
    schemas = {s.node_id: s for node in part(pack, "nodes").NODES if (s := node.define_schema())}

    def plain(name):
        return [i.id for i in schemas[name].inputs if not i.extra_dict.get("advanced")]

    assert "method" not in plain("IterisMerge")
    assert plain("IterisMerge")[3] == "preset"
    folded = {"contexts", "generic", "composites", "empty_share", "steps", "share_ranks"}
    assert not folded & set(plain("IterisSettings"))
    assert len(plain("IterisSettings")) <= 13


def test_messages_name_inputs_of_the_nodes(kit, loras):
    """Not options of the library."""
    tensors = load_file(kit.loras / "b.safetensors")
    save_file({**tensors, "lora_unet_elsewhere.diff": torch.ones(3)}, loras / "more.safetensors")
    spec = kit.specs.make_spec(loras / "more.safetensors", trigger="tok")
    merge = kit.node("merge_nodes", "IterisMerge").execute
    with pytest.raises(kit.core.IterisError, match="use cannot_merge: skip on IterIS Settings"):
        merge(kit.model, [spec], kit.clip)
    settings = {**SETTINGS, "timesteps": 8}
    with pytest.raises(kit.core.IterisError, match="set denoising_steps on IterIS Settings to 8"):
        merge(kit.model, [spec], kit.clip, settings={**settings, "cannot_merge": "skip"})
