"""The workflows for real models, run from the file that a user opens.

The files that those for SD 1.5, SDXL and FLUX ask for are there, thin and random; reduced models
stand in for the others. The front end opens the graph and says what it would send; pictures are
made small and samples few, as a user in a hurry would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
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
    "image_size": 64, "latents": "noise", "length": 5,
}  # fmt: skip
WORKFLOWS = {
    "two_concepts_sd15": ("my_cat", "my_dog"),
    "three_concepts_sdxl": ("xl_cat", "xl_dog", "xl_style"),
    "lora_stack_sdxl": ("xl_cat", "xl_dog", "xl_style"),
    "subject_and_style_sdxl": ("xl_cat", "xl_style"),
    "flux": ("flux_cat", "flux_dog"),
}
"""The LoRAs that a user chooses in each."""
REDUCED = {
    "z_image": ("zimage", ("attention.qkv", "attention.out", "feed_forward.w2")),
    "qwen_image": ("qwen", ("attn.to_q", "attn.to_v", "attn.to_out.0")),
    "wan22_two_experts": ("wan", ("self_attn.q", "self_attn.o", "cross_attn.k")),
}
"""The model that stands in, and the layers that its LoRAs change."""
_GONE = ("VAELoader", "SaveImage", "CreateVideo", "SaveVideo")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, library: None) -> Path:
    from thin_checkpoints import THIN_ENCODERS, write_workflow_models

    base = tmp_path_factory.mktemp("workflows")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "iteris-lora").symlink_to(ROOT)
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
    merge = graph[merging(graph)]["inputs"]
    if "settings" not in merge:
        graph["settings"] = node("IterisSettings", timesteps=1, image_size=64, latents="noise")
        merge["settings"] = ["settings", 0]
    return graph


def with_loras(graph: Graph, names: Sequence[str]) -> Graph:
    """The graph with these LoRAs chosen, and words for each."""
    concepts = [entry for entry in graph.values() if entry["class_type"] == "IterisConcept"]
    for number, name in enumerate(names, 1):
        if concepts:
            files = {f"lora_{part}": f"{name}_{part}.safetensors" for part in ("name", "low")}
            concepts[number - 1]["inputs"] |= {**files, "trigger": name}
        else:
            rows = graph[of_class(graph, "IterisLoras")]["inputs"]
            rows |= {f"lora_{number}": f"{name}.safetensors", f"words_{number}": name}
    return graph


def of_class(graph: Graph, kind: str) -> str:
    """The number of the one node of a class."""
    (found,) = (number for number, entry in graph.items() if entry["class_type"] == kind)
    return found


def merging(graph: Graph) -> str:
    (found,) = (n for n, entry in graph.items() if entry["class_type"].startswith("IterisMerge"))
    return found


def loras_in(graph: Graph) -> list[str]:
    """The files of the LoRAs that are on."""
    return [
        value
        for entry in graph.values()
        if entry["class_type"] in ("IterisConcept", "IterisLoras")
        for key, value in entry["inputs"].items()
        if key.startswith("lora_")
        and value not in ("none", None)
        and entry["inputs"].get(key.replace("lora_", "on_"), True)
    ]


def with_stock_loader(graph: Graph, name: str, strength: float, words: str) -> Graph:
    """The same graph with Load LoRA in place of the merge, and its trigger words as a text."""
    graph = copy.deepcopy(graph)
    merge = of_class(graph, "IterisMerge")
    given = graph[merge]["inputs"]
    for entry in graph.values():
        for key, value in entry["inputs"].items():
            if value == [merge, 5]:
                entry["inputs"][key] = words
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
    graph = with_loras(small(seen["prompt"]), WORKFLOWS[name])
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
    loras = loras_in(graph)
    assert len(loras) == len(WORKFLOWS[name])
    assert all(Path(lora).stem in recipe for lora in loras)
    assert str(base) not in recipe

    words = metadata.get("modelspec.trigger_phrase", "")
    loaded = server.run(with_stock_loader(graph, saved, 1.0, words))
    plain = server.run(with_stock_loader(graph, saved, 0.0, words))
    assert psnr(pixels(server, loaded[of_class(graph, "SaveImage")]), picture) > 40
    assert psnr(pixels(server, plain[of_class(graph, "SaveImage")]), picture) < 35


def test_the_graph_that_bakes_writes_a_checkpoint(
    server: Client, base: Path, tmp_path: Path
) -> None:
    file = ROOT / "workflows" / "bake_checkpoint_sd15.json"
    seen = look(server, file, tmp_path / "opened.png", "prompt")
    graph = with_loras(small(seen["prompt"]), WORKFLOWS["two_concepts_sd15"])
    picture = pixels(server, server.run(graph)[of_class(graph, "SaveImage")])
    (baked,) = (base / "output" / "checkpoints").glob("iteris_merged*.safetensors")
    baked.rename(base / "models" / "checkpoints" / "baked.safetensors")
    loader, merge = of_class(graph, "CheckpointLoaderSimple"), merging(graph)
    ours = [n for n, entry in graph.items() if entry["class_type"].startswith("Iteris")]
    for number in (*ours, of_class(graph, "CheckpointSave"), of_class(graph, "PreviewAny")):
        del graph[number]
    graph[loader]["inputs"]["ckpt_name"] = "baked.safetensors"
    for entry in graph.values():
        for key, value in entry["inputs"].items():
            if isinstance(value, list) and value[0] == merge:
                entry["inputs"][key] = [loader, value[1]]
    drawn = pixels(server, server.run(graph)[of_class(graph, "SaveImage")])
    assert psnr(drawn, picture) > 40


def on_reduced(graph: Graph, model: str) -> Graph:
    """The same graph on a reduced model, up to the latents, which are saved."""
    for number, entry in list(graph.items()):
        kind, given = entry["class_type"], entry["inputs"]
        if kind == "UNETLoader":
            factor = 0.9 if "low_noise" in given["unet_name"] else 1.0
            graph[number] = node("ReducedModel", name=model, factor=factor)
        elif kind == "CLIPLoader":
            graph[number] = node("ReducedClip", name=model, factor=1.0)
        elif kind == "VAEDecode":
            graph[number] = node(
                "SaveLatent", samples=given["samples"], filename_prefix="latents/reduced"
            )
        elif kind in _GONE:
            del graph[number]
        elif kind == "IterisSaveLora":
            given.pop("thumbnail", None)
        elif kind == "KSamplerAdvanced":
            given.update({"start_at_step": min(given["start_at_step"], 1)})
            given.update({"end_at_step": 1 if given["end_at_step"] == 10 else 10000})
    return graph


def write_loras(folder: Path, names: list[str], model: str, layers: tuple[str, ...]) -> None:
    import reduced_models

    network = getattr(reduced_models, model)()[0].model.diffusion_model
    sites = {
        f"diffusion_model.{name}": (module.weight.shape[0], module.weight.shape[1])
        for name, module in network.named_modules()
        if name.endswith(layers)
    }
    for seed, name in enumerate(names):
        reduced_models.write_lora(folder / name, sites, seed)


@pytest.mark.parametrize("name", REDUCED)
def test_a_workflow_runs_on_a_reduced_model(
    client: Client, models: Path, tmp_path: Path, name: str
) -> None:
    model, layers = REDUCED[name]
    seen = look(client, ROOT / "workflows" / f"{name}.json", tmp_path / "opened.png", "prompt")
    assert (seen["missing"], seen["dialogs"], seen["errors"]) == ([], [], [])
    graph = with_loras(on_reduced(small(seen["prompt"]), model), ("cat", "dog"))
    loras = loras_in(graph)
    write_loras(models / "models" / "loras", loras, model, layers)
    outputs = client.run(graph)
    saved = [
        outputs[number]["text"][0].splitlines()[0]
        for number, entry in graph.items()
        if entry["class_type"] == "IterisSaveLora"
    ]
    assert len(saved) == (2 if name == "wan22_two_experts" else 1)
    for file in saved:
        with safe_open(models / "models" / "loras" / file, "pt") as opened:
            assert all(Path(lora).stem in opened.metadata()["iteris"] for lora in loras)
            assert len(opened.keys()) >= 3 * len(layers)
    (drawn,) = outputs[of_class(graph, "SaveLatent")]["latents"]
    assert (models / "output" / drawn["subfolder"] / drawn["filename"]).is_file()
