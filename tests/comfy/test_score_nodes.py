"""A shared graph can only load scorers from the models folders."""

import importlib.util
import json
import socket

import pytest
import torch
from kit import node, part, use_folders
from PIL import Image


@pytest.fixture
def loader(pack, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return node(pack, "score_nodes", "ClipScorerLoader").execute


def test_architectures_are_open_clip_s_own(pack):
    import open_clip

    names = part(pack, "nodes.score_nodes").ARCHITECTURES
    assert names[0] == "ViT-L-14-quickgelu"
    assert set(names) <= set(open_clip.list_models())


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("hf-hub:timm/ViT-B-16-SigLIP", "x.safetensors", "is not one of ViT-L-14"),
        ("local-dir:/etc", "x.safetensors", "is not one of ViT-L-14"),
        ("ViT-B-16-SigLIP", "x.safetensors", "is not one of ViT-L-14"),
        ("ViT-B-32", "../../../etc/passwd", "not in any of the folders"),
        ("ViT-B-32", "openai", "not in any of the folders"),
        ("ViT-B-32", "none", "not in any of the folders"),
    ],
)
def test_nothing_else_is_loaded_or_fetched(pack, loader, name, weights, message):
    with pytest.raises(part(pack, "iteris_core").IterisError, match=message):
        loader(name, weights)


def test_a_file_of_weights(pack, loader, tmp_path, monkeypatch):
    import open_clip

    use_folders(monkeypatch, tmp_path, "clip_vision")
    monkeypatch.setattr(part(pack, "nodes.score_nodes"), "ARCHITECTURES", ["ViT-S-32-alt"])
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    torch.save(model.state_dict(), tmp_path / "clip_vision" / "small.pt")
    (scorer,) = loader("ViT-S-32-alt", "small.pt").result
    picture = Image.new("RGB", (40, 40), "red")
    assert scorer().image_alignment([picture], [picture]).item() == pytest.approx(1, abs=1e-5)


def test_dinov2_as_comfyui_loads_it(pack, tmp_path):
    """DINOv2's architecture, thin, through ComfyUI's own class of vision models."""
    import comfy.clip_vision

    config = {
        "model_type": "dinov2", "num_hidden_layers": 2, "hidden_size": 64, "image_size": 518,
        "num_attention_heads": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False,
        "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
    }  # fmt: skip
    (tmp_path / "dino.json").write_text(json.dumps(config))
    vision = comfy.clip_vision.ClipVisionModel(str(tmp_path / "dino.json"))
    torch.manual_seed(0)
    for weight in vision.model.parameters():
        torch.nn.init.normal_(weight.data, std=0.3)
    (scorer,) = node(pack, "score_nodes", "VisionScorer").execute(vision).result
    alignment = node(pack, "score_nodes", "ClipImageAlignment").execute
    images = torch.zeros(3, 70, 50, 3)
    images[0, :, :, 0] = images[1, :35] = images[2, :, :20, 2] = 1
    assert alignment(scorer, images[:1], images[:1]).result[0] == pytest.approx(1, abs=1e-4)
    assert alignment(scorer, images[:2], images[2:, :40]).result[0] < 1 - 1e-4
    with pytest.raises(part(pack, "iteris_core").IterisError, match="cannot read text"):
        scorer().text_alignment([Image.new("RGB", (4, 4))], ["a"])


def test_batches_with_one_label_share_a_row(pack):
    """Each below its own prompt, as a list of prompts comes from Compare Merges."""
    sheets = part(pack, "nodes.score_nodes")
    made = []
    with pytest.MonkeyPatch.context() as patched:
        draw = sheets.contact_sheet
        patched.setattr(
            sheets, "contact_sheet", lambda *a, **k: made.append((a, k)) or draw(*a, **k)
        )
        sheet = node(pack, "score_nodes", "ScoreSheet").execute
        images, labels = [torch.zeros(2, 8, 8, 3)] * 4, ["a alone", "iteris"] * 2
        sheet(images, labels, ["a cat", "a cat", "a dog", "a dog"], [32])
        sheet(images[:2], labels[:2], ["a cat", "a cat"], [32])
        sheet(images[:1], ["x"], ["one\ntwo"], [32])
    shapes = [({row: len(of) for row, of in rows.items()}, names) for (rows, names), _ in made]
    assert shapes[0] == ({"a alone": 4, "iteris": 4}, ["a cat", "", "a dog", ""])
    assert shapes[1] == ({"a alone": 2, "iteris": 2}, ["", ""])
    assert shapes[2] == ({"x": 2}, ["one", "two"])
    assert [given["title"] for _, given in made] == ["", "a cat", ""]


def test_without_open_clip_only_scores_are_missing(loader, pack, monkeypatch):
    error, find = part(pack, "iteris_core").IterisError, importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name)
    )
    *_, scorer = node(pack, "comfy_toybox", "IterisToybox").execute("sks1").result
    picture = torch.zeros(1, 8, 8, 3)
    with pytest.raises(error, match="pip install open_clip_torch"):
        node(pack, "score_nodes", "ClipImageAlignment").execute(scorer, picture, picture)
    with pytest.raises(error, match="pip install open_clip_torch"):
        loader("ViT-B-32", "small.pt")
