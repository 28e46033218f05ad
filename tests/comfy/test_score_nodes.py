"""A shared graph can only load scorers from the models folders."""

from __future__ import annotations

import importlib
import importlib.util
import socket
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image


@pytest.fixture
def nodes(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return importlib.import_module(f"{pack.__name__}.nodes.score_nodes")


def test_architectures_are_open_clip_s_own(nodes: Any) -> None:
    import open_clip

    names = nodes.architectures()
    assert names[0] == "ViT-L-14-quickgelu"
    assert len(names) > 50
    assert set(names) <= set(open_clip.list_models())
    assert not {"roberta-ViT-B-32", "ViT-B-16-SigLIP"} & set(names)  # tokenizers of a hub


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/ViT-B-16-SigLIP", "local-dir:/etc", "ViT-B-16-SigLIP"]
)
def test_nothing_else_is_loaded_or_fetched(nodes: Any, name: str) -> None:
    core = importlib.import_module(nodes.__name__.replace("nodes.score_nodes", "iteris_core"))
    with pytest.raises(core.IterisError, match="not one of open_clip's"):
        nodes.ClipScorerLoader.execute(name, "x.safetensors")


@pytest.mark.parametrize("name", ["../../../etc/passwd", "openai", "none"])
def test_weights_are_those_of_the_models_folders(nodes: Any, name: str) -> None:
    core = importlib.import_module(nodes.__name__.replace("nodes.score_nodes", "iteris_core"))
    with pytest.raises(core.IterisError, match="not in any of the folders"):
        nodes.ClipScorerLoader.execute("ViT-S-32", name)


def test_a_file_of_weights(nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    import open_clip

    torch.manual_seed(0)
    model = open_clip.create_model("ViT-S-32-alt")
    torch.save(model.state_dict(), tmp_path / "small.pt")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "clip_vision", ([str(tmp_path)], {".pt"})
    )
    (scorer,) = nodes.ClipScorerLoader.execute("ViT-S-32-alt", "small.pt").result
    picture = Image.new("RGB", (40, 40), "red")
    assert scorer.image_alignment([picture], [picture]).item() == pytest.approx(1, abs=1e-5)


def test_dinov2_as_comfyui_loads_it(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv2's architecture, thin, through ComfyUI's own class of vision models."""
    import json
    import tempfile

    import comfy.clip_vision

    config = {
        "model_type": "dinov2", "num_hidden_layers": 2, "hidden_size": 64, "image_size": 518,
        "num_attention_heads": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False,
        "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
    }  # fmt: skip
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        vision = comfy.clip_vision.ClipVisionModel(file.name)
    torch.manual_seed(0)
    for weight in vision.model.parameters():
        torch.nn.init.normal_(weight.data, std=0.3)
    (scorer,) = nodes.VisionScorer.execute(vision).result
    monkeypatch.setattr(
        nodes.ClipImageAlignment, "hidden", type("Hidden", (), {"unique_id": None}), raising=False
    )
    images = torch.zeros(3, 70, 50, 3)
    images[0, :, :, 0] = images[1, :35] = images[2, :, :20, 2] = 1
    mean, *_ = nodes.ClipImageAlignment.execute(scorer, images[:1], images[:1]).result
    assert mean == pytest.approx(1, abs=1e-4)
    apart, *_ = nodes.ClipImageAlignment.execute(scorer, images[:2], images[2:, :40]).result
    assert apart < 1 - 1e-4
    core = importlib.import_module(nodes.__name__.replace("nodes.score_nodes", "iteris_core"))
    with pytest.raises(core.IterisError, match="cannot read text"):
        scorer.text_alignment([Image.new("RGB", (4, 4))], ["a"])


def test_without_open_clip_only_scores_are_missing(
    nodes: Any, pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = importlib.import_module(f"{pack.__name__}.iteris_core")
    toybox = importlib.import_module(f"{pack.__name__}.nodes.toybox_node")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "open_clip" else find(name)
    )
    *_, scorer = toybox.IterisToybox.execute("sks1").result
    picture = torch.zeros(1, 8, 8, 3)
    with pytest.raises(core.IterisError, match="pip install open_clip_torch"):
        nodes.ClipImageAlignment.execute(scorer, picture, picture)
    with pytest.raises(core.IterisError, match="pip install open_clip_torch"):
        nodes.ClipScorerLoader.execute("ViT-S-32", "small.pt")
