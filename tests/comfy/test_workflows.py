"""The workflows for real models, run from the file that a user opens, on reduced models.

The front end opens the graph and says what it would send; pictures are made small and samples few,
as a user in a hurry would, and the latents are saved.
"""

from pathlib import Path
from typing import Any

import pytest
import reduced_models
import torch
from client import node
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file
from test_front_end import look, pytestmark  # noqa: F401

SMALL: dict[str, Any] = {
    "width": 64, "height": 64, "batch_size": 1, "steps": 2, "samples": 2, "timesteps": 1,
    "image_size": 64, "latents": "noise", "length": 5,
}  # fmt: skip
UNET = ("to_q", "to_v", "to_out.0")
TWO, THREE, TURBO = ("cat", "dog"), ("cat", "dog", "style"), ("cat", "turbo")
WORKFLOWS = {
    "two_concepts_sd15": ("sd15", UNET, TWO),
    "three_concepts_sdxl": ("sdxl", UNET, THREE),
    "lora_stack_sdxl": ("sdxl", UNET, THREE),
    "subject_and_style_sdxl": ("sdxl", UNET, TWO),
    "flux": ("flux", ("img_attn.qkv", "txt_attn.proj", "linear1"), TWO),
    "flux2_klein": ("flux2", ("img_attn.qkv", "txt_attn.proj", "linear1"), TURBO),
    "krea2": ("krea2", ("attn.wq", "attn.wo", "mlp.down"), TWO),
    "anima": ("anima", ("self_attn.q_proj", "cross_attn.output_proj", "mlp.layer1"), TURBO),
    "z_image": ("zimage", ("attention.qkv", "attention.out", "feed_forward.w2"), TWO),
    "qwen_image": ("qwen", ("attn.to_q", "attn.to_v", "attn.to_out.0"), TWO),
    "wan22_two_experts": ("wan", ("self_attn.q", "self_attn.o", "cross_attn.k"), TWO),
}
"""The model that stands in, the layers that its LoRAs change, and those that a user chooses; one
of them is known by its name to be always on."""
LOADERS = ("CLIPLoader", "DualCLIPLoader")
GONE = ("VAELoader", "SaveImage", "CreateVideo", "SaveVideo")


def small(graph):
    for entry in graph.values():
        for name, value in entry["inputs"].items():
            if name in SMALL and not isinstance(value, list):  # else it is a link
                entry["inputs"][name] = SMALL[name]
    merges = (e for e in graph.values() if e["class_type"].startswith("IterisMerge"))
    given = next(merges)["inputs"]
    if "settings" not in given:
        graph["settings"] = node("IterisSettings", timesteps=1, image_size=64, latents="noise")
        given["settings"] = ["settings", 0]
    return graph


def with_loras(graph, names):
    """The graph with these LoRAs chosen, and words for each."""
    concepts = [entry for entry in graph.values() if entry["class_type"] == "IterisConcept"]
    for number, name in enumerate(names, 1):
        if concepts:
            files = {f"lora_{part}": f"{name}_{part}.safetensors" for part in ("name", "low")}
            concepts[number - 1]["inputs"] |= {**files, "trigger": name}
        else:
            (rows,) = (e["inputs"] for e in graph.values() if e["class_type"] == "IterisLoras")
            words = "" if name == "turbo" else name
            rows |= {f"lora_{number}": f"{name}.safetensors", f"words_{number}": words}
    return graph


def loras_in(graph):
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


def on_reduced(graph, model):
    """The same graph on a reduced model, up to the latents, which are saved."""
    clip = node("ReducedClip", name=model, factor=1.0)
    for number, entry in list(graph.items()):
        kind, given = entry["class_type"], entry["inputs"]
        if kind in ("UNETLoader", "CheckpointLoaderSimple"):
            factor = 0.9 if "low_noise" in given.get("unet_name", "") else 1.0
            graph[number] = node("ReducedModel", name=model, factor=factor)
        if kind == "CheckpointLoaderSimple":
            graph["clip"] = clip
            for other in graph.values():
                links = {n: ["clip", 0] for n, v in other["inputs"].items() if v == [number, 1]}
                other["inputs"].update(links)
        elif kind in LOADERS:
            graph[number] = clip
        elif kind == "VAEDecode":
            prefix = "latents/reduced"
            graph[number] = node("SaveLatent", samples=given["samples"], filename_prefix=prefix)
        elif kind in GONE:
            del graph[number]
        elif kind == "IterisSaveLora":
            given.pop("thumbnail", None)
        elif kind == "KSamplerAdvanced":
            given["start_at_step"] = min(given["start_at_step"], 1)
            given["end_at_step"] = 1 if given["end_at_step"] == 10 else 10000
    return graph


def write_loras(folder, names, network, layers):
    sites = {
        f"diffusion_model.{name}": (module.weight.shape[0], module.weight.shape[1])
        for name, module in network.named_modules()
        if name.endswith(layers)
    }
    for seed, name in enumerate(names):
        reduced_models.write_lora(folder / name, sites, seed)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_runs_from_its_file(client, models, tmp_path, name):
    model, layers, names = WORKFLOWS[name]
    network = getattr(reduced_models, model)()[0].model.diffusion_model  # skips where it is not
    seen = look(client, ROOT / "workflows" / f"{name}.json", tmp_path / "opened.png", "prompt")
    assert (seen["missing"], seen["dialogs"], seen["errors"]) == ([], [], [])
    # Of a front end that is older than its server.
    assert [text for text in seen["toasts"] if "Version Compatibility" not in text] == []
    graph = with_loras(on_reduced(small(seen["prompt"]), model), names)
    loras = loras_in(graph)
    write_loras(models / "models" / "loras", loras, network, layers)
    outputs = client.run(graph)
    saved = [
        outputs[number]["text"][0].splitlines()[0]
        for number, entry in graph.items()
        if entry["class_type"] == "IterisSaveLora"
    ]
    experts = 2 if name == "wan22_two_experts" else 1
    assert (len(saved), len(loras)) == (experts, experts * len(names))
    for file in saved:
        with safe_open(models / "models" / "loras" / file, "pt") as opened:
            recipe = opened.metadata()["iteris"]
        assert all(Path(lora).stem in recipe for lora in loras)
        assert ('"always_on": "include"' in recipe) == ("turbo" in names)
        assert str(models) not in recipe
        assert len(load_file(models / "models" / "loras" / file)) >= 3 * len(layers)
    (drawn,) = (shown["latents"] for shown in outputs.values() if "latents" in shown)
    latents = models / "output" / drawn[0]["subfolder"] / drawn[0]["filename"]
    assert bool(torch.isfinite(load_file(latents)["latent_tensor"]).all())
