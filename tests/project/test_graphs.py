"""The example graphs as files: their groups, notes and thumbnails."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
RESULTS = ROOT / "benchmarks" / "results"
MEMORY = json.loads((RESULTS / "memory.json").read_text("utf-8"))
TOYBOX = json.loads((RESULTS / "graphs.json").read_text("utf-8"))
"""Of ``benchmarks/graphs.py``."""
REAL = {
    "two_concepts_sd15": "SD 1.5, 512 px",
    "bake_checkpoint_sd15": "SD 1.5, 512 px",
    "three_concepts_sdxl": "SDXL, 1024 px",
    "lora_stack_sdxl": "SDXL, 1024 px",
    "subject_and_style_sdxl": "SDXL, 1024 px",
    "flux": "FLUX.1, 1024 px",
    "flux2_klein": "FLUX.2 Klein 4B, 1024 px",
    "krea2": "Krea 2, 1024 px",
    "anima": "Anima, 1024 px",
    "z_image": "Z-Image, 1024 px",
    "qwen_image": "Qwen-Image, 1024 px",
    "wan22_two_experts": "Wan 14B, 17 frames of 832 x 480",
}
"""The case of ``memory.json`` that a graph's note speaks of."""
LOADERS = {
    "CheckpointLoaderSimple": ["checkpoints"],
    "UNETLoader": ["diffusion_models"],
    "CLIPLoader": ["text_encoders"],
    "DualCLIPLoader": ["text_encoders"],
    "VAELoader": ["vae"],
}
"""Where a loader of ComfyUI looks for its files."""
TITLE = 30
"""The height of a node's title, above its position."""

every_graph = pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def box(node):
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + (0 if node["flags"].get("collapsed") else height)


@every_graph
def test_every_node_is_in_a_group_and_none_covers_another(path):
    graph = read(path)
    for node in graph["nodes"]:
        left, top, right, bottom = box(node)
        assert any(
            x <= left and y <= top and right <= x + w and bottom <= y + h
            for x, y, w, h in (group["bounding"] for group in graph["groups"])
        ), node["type"]
    for one, two in combinations(graph["nodes"], 2):
        a, b = box(one), box(two)
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one["type"], two["type"])


@every_graph
def test_nothing_stands_below_a_merge(path):
    """It grows by its report, and by pictures while it samples."""
    nodes = read(path)["nodes"]
    merges = [n for n in nodes if n["type"].startswith(("IterisMerge", "IterisCompare"))]
    for merge in merges:
        left, _, right, bottom = box(merge)
        below = [n["type"] for n in nodes if box(n)[1] >= bottom and left < box(n)[2]
                 and box(n)[0] < right]  # fmt: skip
        assert below == []


@every_graph
def test_a_note_says_memory_and_minutes_that_were_measured(path):
    (note,) = (n["widgets_values"][0] for n in read(path)["nodes"] if n["type"] == "MarkdownNote")
    assert "**Memory:**" in note
    assert ("**Minutes:**" in note) == (path.stem not in REAL)
    if path.stem not in REAL:
        seconds, peak = TOYBOX[path.stem]["cpu_seconds"], TOYBOX[path.stem]["peak_gib"]
        minutes = f"{seconds / 60:.1f}" if seconds >= 60 else f"less than one ({seconds:.0f} s)"
        assert f"**Minutes:** {minutes} on one CPU core, without a graphics card." in note
        assert (
            f"**Memory:** {peak:.1f} GiB peak for all of ComfyUI, without a graphics card" in note
        )
        return
    case = MEMORY[REAL[path.stem]]
    figures = re.search(
        r"with ([\d.]+) GiB of the card .* takes ([\d.]+) GiB there and ([\d.]+) GiB of", note
    )
    assert figures is not None
    budget, peak, host = map(float, figures.groups())
    made = case["by_host"]["45"]  # a PC of 64 GiB
    assert (budget, peak, host) == (
        case["budget_gib"], round(made["peak_gib"], 1), round(made["host_gib"]),
    )  # fmt: skip
    assert "it was not run on a card" in note


@every_graph
def test_a_loader_says_where_its_files_are(path):
    """The front end offers to download what ``properties.models`` names."""
    for node in read(path)["nodes"]:
        if node["type"] not in LOADERS:
            continue
        files = [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]
        offered = node["properties"]["models"]
        assert [one["name"] for one in offered] == files
        for one in offered:
            assert one["url"].startswith("https://huggingface.co/")
            assert one["url"].endswith(f"/{one['name']}")
            assert one["directory"] in LOADERS[node["type"]]


@every_graph
def test_no_graph_names_a_lora_of_somebody_s(path):
    """Its first run would end with a name that is not in the list."""
    for node in read(path)["nodes"]:
        if node["type"] in ("IterisLoras", "IterisConcept"):
            assert not [v for v in node["widgets_values"] if str(v).endswith(".safetensors")]


def test_two_graphs_are_apps():
    """In App mode the front end shows these widgets, and what these nodes give."""
    texts = read(ROOT / "locales" / "en" / "nodeDefs.json")
    apps = [graph for path in GRAPHS if (graph := read(path))["extra"].get("linearData")]
    assert len(apps) == 2
    for graph in apps:
        kinds = {node["id"]: node["type"] for node in graph["nodes"]}
        app = graph["extra"]["linearData"]
        assert {number for number, _ in app["inputs"]} <= kinds.keys()
        shown = [(kinds[number], name) for number, name in app["inputs"] if name != "loras"]
        ours = [(kind, name) for kind, name in shown if kind in texts]
        assert [name for kind, name in ours if name not in texts[kind]["inputs"]] == []
        assert {kinds[number] for number in app["outputs"]} <= {"PreviewImage", "SaveImage"}


@every_graph
def test_a_thumbnail_is_there(path):
    with Image.open(path.with_suffix(".jpg")) as picture:
        assert picture.size[0] >= 800
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 100
    assert path.with_suffix(".jpg").stat().st_size < 120_000


def test_no_number_stands_for_something_else():
    """-11 once stood for a strength in CLIP that is the model's."""
    values = [value for path in GRAPHS for node in read(path)["nodes"]
              for value in node.get("widgets_values", [])]  # fmt: skip
    assert -11 not in values


@pytest.mark.parametrize("language", ["", "zh"])
def test_help_pages_have_a_picture(language):
    """The help panel looks for it from the folder of the pages, whatever the language."""
    docs = ROOT / "web" / "docs"
    pages = sorted(docs.glob("*/zh.md" if language else "*.md"))
    assert len(pages) == 17
    for page in pages:
        name = page.parent.name if language else page.stem
        (shown,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
        assert shown == f"{name}/{language or 'en'}.jpg"
        with Image.open(docs / shown) as picture:
            assert picture.size[0] >= 300
        assert (docs / shown).stat().st_size < 60_000


@every_graph
def test_settings_have_a_value_for_each_input(path):
    """By position, as the front end reads them; tests/comfy/test_texts.py does so for all nodes."""
    texts = read(ROOT / "locales" / "en" / "nodeDefs.json")["IterisSettings"]["inputs"]
    for node in read(path)["nodes"]:
        if node["type"] == "IterisSettings":
            assert len(node["widgets_values"]) == len(texts)


@every_graph
def test_a_list_of_loras_leaves_their_kinds_to_the_files(path):
    """Choosing a file does not change what its row says: a speed LoRA would be a subject."""
    for node in read(path)["nodes"]:
        if node["type"] == "IterisLoras":
            assert node["widgets_values"][5:70:7] == ["auto"] * 10


@every_graph
def test_no_prompt_names_two_concepts(path):
    """They would mix (README). Only the graph with a prompt for each half shows that, beside it."""
    for node in read(path)["nodes"]:
        if node["type"] == "CLIPTextEncode" and node.get("title") != "One prompt for both":
            names = set(re.findall(r"\b(?:sks|zwx)\d*\b", node["widgets_values"][0]))
            assert len(names) <= 1, node["widgets_values"]
    outputs = {node["id"]: node["outputs"] for node in read(path)["nodes"]}
    for _, origin, slot, *_ in read(path)["links"]:
        assert outputs[origin][slot]["name"] != "trigger_words"  # of all concepts


@every_graph
def test_a_note_says_how_many_samples_the_graph_has(path):
    nodes = read(path)["nodes"]
    (note,) = (n["widgets_values"][0] for n in nodes if n["type"] == "MarkdownNote")
    if any(30 in n.get("widgets_values", []) for n in nodes if n["type"].startswith("IterisMerge")):
        assert "on 80 samples (this graph has 30, which take less)" in note


@pytest.mark.parametrize("name", ["quick_start_toybox", "compare_methods"])
def test_a_comparison_has_each_lora_alone(name):
    graph = read(ROOT / "workflows" / f"{name}.json")
    (compare,) = (node for node in graph["nodes"] if node["type"] == "IterisCompareMerges")
    assert {"base", "each alone", "stacked", "iteris"} <= {*compare["widgets_values"][:6]}
    assert "PreviewImage" in {node["type"] for node in graph["nodes"]}


def test_a_turbo_model_is_merged_as_it_draws():
    """Without empty prompts, which its weights do not say, in as many steps as the sampler has."""
    graph = read(ROOT / "workflows" / "z_image.json")
    nodes = {node["type"]: node for node in graph["nodes"]}
    names = read(ROOT / "locales" / "en" / "nodeDefs.json")["IterisSettings"]["inputs"]
    values = dict(zip(names, nodes["IterisSettings"]["widgets_values"], strict=True))
    steps, cfg = nodes["KSampler"]["widgets_values"][2:4]
    assert (values["empty_prompts"], values["denoising_steps"], cfg) == ("no", steps, 1)
    ends = [nodes["IterisSettings"]["id"], 0, nodes["IterisMerge"]["id"], 5]
    assert ends in [link[1:5] for link in graph["links"]]
    for name in ("qwen_image", "wan22_two_experts"):
        note = next(n for n in read(ROOT / "workflows" / f"{name}.json")["nodes"]
                    if n["type"] == "MarkdownNote")["widgets_values"][0]  # fmt: skip
        assert "*empty_prompts* on *no*" in note
