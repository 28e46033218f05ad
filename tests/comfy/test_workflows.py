"""The workflows for SD 1.5, SDXL and FLUX, run from the file that a user opens.

The files that they ask for are there, thin and random. The front end opens the graph and says what
it would send; pictures are made small and samples few, as a user in a hurry would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from client import Client, Graph, node
from conftest import ROOT, running
from safetensors import safe_open
from test_comfy_server import pixels, psnr
from test_front_end import look, pytestmark  # noqa: F401

SMALL: dict[str, Any] = {
    "width": 64, "height": 64, "batch_size": 1, "steps": 2, "samples": 2, "timesteps": 1,
    "latent_size": 8, "latents": "noise",
}  # fmt: skip
WORKFLOWS = {"two_concepts_sd15": 2, "three_concepts_sdxl": 3, "flux": 2}
"""How many LoRAs each merges."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, library: None) -> Path:
    from thin_checkpoints import THIN_ENCODERS, write_workflow_models

    base = tmp_path_factory.mktemp("workflows")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "comfyui-iteris").symlink_to(ROOT)
    (base / "custom_nodes" / "thin_encoders_of_tests.py").write_text(THIN_ENCODERS)
    write_workflow_models(base / "models")
    return base


@pytest.fixture(scope="module")
def server(base: Path) -> Iterator[Client]:
    with running(base) as client:
        yield client


def small(graph: Graph) -> Graph:
    for entry in graph.values():
        for name, value in entry["inputs"].items():
            if name in SMALL and not isinstance(value, list):  # else it is a link
                entry["inputs"][name] = SMALL[name]
    merge = graph[of_class(graph, "IterisMerge")]["inputs"]
    if "settings" not in merge:
        graph["settings"] = node("IterisSettings", timesteps=1, latent_size=8, latents="noise")
        merge["settings"] = ["settings", 0]
    return graph


def of_class(graph: Graph, kind: str) -> str:
    """The number of the one node of a class."""
    (found,) = (number for number, entry in graph.items() if entry["class_type"] == kind)
    return found


def with_stock_loader(graph: Graph, name: str, strength: float) -> Graph:
    """The same graph with Load LoRA in place of the merge."""
    graph = copy.deepcopy(graph)
    merge = of_class(graph, "IterisMerge")
    given = graph[merge]["inputs"]
    graph[merge] = node(
        "LoraLoader", model=given["model"], clip=given["clip"], lora_name=name,
        strength_model=strength, strength_clip=strength,
    )  # fmt: skip
    ours = [number for number, entry in graph.items() if entry["class_type"].startswith("Iteris")]
    shows = [number for number, entry in graph.items() if entry["class_type"] == "PreviewAny"]
    for number in (*ours, *shows):
        del graph[number]
    return graph


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_from_its_file(
    server: Client, base: Path, tmp_path: Path, name: str
) -> None:
    file = ROOT / "workflows" / f"{name}.json"
    seen = look(server, file, tmp_path / "opened.png", "prompt")
    assert (seen["missing"], seen["dialogs"], seen["errors"]) == ([], [], [])
    # Of a front end that is older than its server.
    assert [text for text in seen["toasts"] if "Version Compatibility" not in text] == []
    graph = small(seen["prompt"])
    outputs = server.run(graph)
    drawn = outputs[of_class(graph, "SaveImage")]
    picture = pixels(server, drawn)
    assert picture.shape == (1, 64, 64, 3)
    assert picture.std() > 5
    assert (base / "output" / drawn["images"][0]["filename"]).is_file()
    (tmp_path / "drawn.png").write_bytes(server.picture(drawn["images"][0]))

    said = outputs[of_class(graph, "IterisSaveLora")]["text"][0]
    saved = said.splitlines()[0]
    with safe_open(base / "models" / "loras" / saved, "pt") as opened:
        metadata = opened.metadata()
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    recipe = metadata["iteris"]
    loras = [
        value
        for entry in graph.values()
        if entry["class_type"] in ("IterisConcept", "IterisLoras")
        for key, value in entry["inputs"].items()
        if key.startswith("lora_") and value not in ("none", None)
    ]
    assert len(loras) == WORKFLOWS[name]
    assert all(Path(lora).stem in recipe for lora in loras)
    assert str(base) not in recipe

    loaded = server.run(with_stock_loader(graph, saved, 1.0))
    plain = server.run(with_stock_loader(graph, saved, 0.0))
    assert psnr(pixels(server, loaded[of_class(graph, "SaveImage")]), picture) > 40
    assert psnr(pixels(server, plain[of_class(graph, "SaveImage")]), picture) < 35
