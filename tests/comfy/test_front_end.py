"""Every graph in ComfyUI's own front end, headless.

Needs node, playwright-core (in NODE_PATH) and Chromium (CHROMIUM, or /usr/bin/chromium).
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
from itertools import combinations, product
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
RUNS = ("quick_start_toybox", "two_in_one_picture", "resize_lora", "extract_lora")


def _ready():
    if (
        shutil.which("node") is None
        or not Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists()
    ):
        return False
    found = subprocess.run(["node", "-e", "require('playwright-core')"], capture_output=True)
    return found.returncode == 0


needs_a_browser = pytest.mark.skipif(
    not _ready(), reason="needs node, playwright-core and Chromium"
)
pytestmark = [pytest.mark.slow, needs_a_browser]


def look(client, graph, picture, *wishes):
    return run("front_end.js", client, graph, picture, *wishes)


def run(script, client, *arguments):
    port = client.base.rpartition(":")[2]
    command = ["node", str(Path(__file__).with_name(script)), port, *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda path: path.stem)
def test_graph_opens(client, graph, tmp_path):
    wishes = ("run",) if graph.stem in RUNS else ()
    before = client.get("/history")
    seen = look(client, graph, tmp_path / "seen.png", *wishes)
    assert seen["nodes"] == len(json.loads(graph.read_text())["nodes"])
    assert seen["missing"] == []
    assert seen["toasts"] == []
    assert seen["dialogs"] == []
    assert seen["errors"] == []
    if wishes:
        new = [run for key, run in client.get("/history").items() if key not in before]
        assert [run["status"]["status_str"] for run in new] == ["success"]
    assert graph.with_suffix(".jpg").is_file()


@pytest.mark.parametrize("graph", GRAPHS, ids=lambda path: path.stem)
def test_graph_opens_in_nodes_2(client, graph, tmp_path):
    """Every node is drawn, and none covers another, of sizes that are not those of the file."""
    seen = look(client, graph, tmp_path / "seen.png", "vue")
    nodes = json.loads(graph.read_text())["nodes"]
    drawn = dict(seen["drawn"])
    if not drawn:
        pytest.skip("a front end without Nodes 2.0")
    assert set(drawn) == {node["id"] for node in nodes}
    assert not [text for text in seen["toasts"] if "placeholder" in text]
    kinds = {node["id"]: node["type"] for node in nodes}
    for (one, a), (two, b) in combinations(drawn.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (kinds[one], a, kinds[two], b)


def test_a_first_graph_by_search_and_drag(client, models, tmp_path):
    """A list of LoRAs that is changed and undone, words that are filled in, a run that is cancelled
    and others."""
    words = {"trainedWords": ["zwx dog", "zwx puppy"]}
    loras = models / "models" / "loras"
    (loras / "b.civitai.info").write_text(json.dumps(words))
    (loras / "people").mkdir()
    shutil.copy(loras / "b.safetensors", loras / "people" / "c.safetensors")
    before = {path.name for path in loras.rglob("*")}
    log = models / "server.log"
    made = log.read_text().count("IterIS: merged with")
    try:
        seen = run("build_graph.js", client, tmp_path)
    finally:
        (loras / "b.civitai.info").unlink()
        shutil.rmtree(loras / "people")
    assert seen["about"].split("\n")[0] == "a.safetensors"
    assert seen["about"].split("\n")[-1] == "sks cat"
    assert seen["folder"][0] == "people/c.safetensors"
    assert seen["links"] == 16
    a = ["a.safetensors", True, 1, 1, 1, "auto", "sks cat"]
    b = ["b.safetensors", True, 1, 1, 1, "auto", "zwx dog; zwx puppy"]
    none = ["none", True, 1, 1, 1, "auto", ""]
    files = [["a.safetensors", True], ["b.safetensors", True]]
    assert seen["empty"]["sent"] == [none] * 3
    assert len(seen["empty"]["shown"]) == 1
    assert seen["chosen"]["sent"] == [a, b, none]
    assert seen["chosen"]["shown"][1:] == files
    names = ("clip strength", "weight", "prompts", "words", "blocks")
    lines = seen["unfolded"]["shown"][2:7]
    assert all(text.startswith(name) for name, (text, _) in zip(names, lines, strict=True))
    assert seen["folded"] == seen["chosen"]
    drawn = [float(weight) for weight in seen["bars"]["drawn"].split(",")]
    assert drawn == sorted(drawn, reverse=True)
    assert (len(drawn), drawn[0], drawn[8], drawn[-1]) == (17, 1, 0.5, 0)
    assert seen["bars"]["named"] == "OUT03 0.5"
    assert seen["bars"]["reset"].endswith(",1")
    assert seen["bars"]["undone"] == ""
    assert seen["bars"]["rows"] == seen["unfolded"]
    assert seen["moved"]["sent"] == [b, a, none]
    assert seen["moved"]["shown"][1:] == files[::-1]
    assert seen["undone"] == seen["chosen"] == seen["on"]
    assert seen["removed"]["sent"] == [b, none, none]
    assert [row[1] for row in seen["off"]["sent"]] == [False, False, True]
    half = ["a.safetensors", True, 0.5, 0.5, *a[4:]]
    assert seen["converted"] == [half, ["b.safetensors", False, 1, 0, *b[4:]], "none"]
    quarter = ["b.safetensors", True, 0.25, 0, *b[4:], "none"]
    assert seen["core"]["LoadLoraModel"] == quarter
    assert seen["core"]["LoadLoraTextEncoder"] == [*quarter[:2], 0, 0.25, *quarter[4:]]
    chain = seen["chain"]
    assert chain["rows"][:7] == ["a.safetensors", True, 0.5, 0.25, *a[4:]]
    assert chain["rows"][7:] == ["b.safetensors", True, 0.75, 0, *b[4:]]
    assert (chain["modes"], chain["taken"]) == ([0, 4, 4, 0], True)
    assert "execution_interrupted" in seen["cancelled"]
    assert (seen["run"], seen["again"]) == ("success", "success")
    # The comparison has the inputs of the merge, and what is not connected there is not here.
    compared, (status, outputs) = seen["compared"], seen["rows"]
    assert compared["types"] == [
        "IterisCompareMerges", "CLIPTextEncode", "CLIPTextEncode", "KSampler", "VAEDecode",
        "IterisScoreSheet", "PreviewImage",
    ]  # fmt: skip
    assert compared["asked"] == ["IterisCompareMerges", None]  # which has the merge's words
    beside = ["conditioning", "latent"]
    assert compared["open"] == [
        *(f"IterisCompareMerges {name}" for name in beside), "IterisScoreSheet scores",
    ]  # fmt: skip
    assert (compared["values"]["samples"], compared["values"]["row_5"]) == (3, "none")
    assert status == "success"
    assert all(text in outputs for text in ("a alone: ", "b alone: ", "stacked: ", "iteris: "))
    # Neither merges again, and a LoRA that was just saved is in the lists.
    assert log.read_text().count("IterIS: merged with iteris") == made + 1
    saved = {path.name for path in loras.rglob("*")} - before
    names = {f"iteris/{name}" for name in saved if name.endswith(".safetensors")}
    assert len(names) == 2
    assert names <= set(seen["listed"])
    assert len([name for name in saved if name.endswith(".preview.png")]) == 2
    cards = [path.read_text() for path in loras.rglob("*.md") if path.name not in before]
    assert len(cards) == 2
    told = ("- `sks cat`", "| a | ", ".preview.png", "- method: `iteris`")
    assert [text for card in cards for text in told if text not in card] == []
    assert "a at 1: sks cat" in seen["text"]
    assert "At strength 0.5" in seen["text"]
    assert seen["errors"] == []
    assert (tmp_path / "left.png").stat().st_size > 20_000


def test_a_blueprint_that_is_dropped_runs(client):
    name = "Merge LoRAs and draw (IterIS)"
    seen = run("blueprint.js", client, ROOT / "subgraphs" / f"{name}.json")
    assert seen["errors"] == []
    assert seen["widgets"] == ["prompt", "negative", "seed"]
    if seen["listed"]:  # of versions that know blueprints of packs
        assert name in seen["listed"]
    graph = seen["prompt"]
    for entry in graph.values():
        given = entry["inputs"]
        given |= {n: v for n, v in (("width", 64), ("height", 64), ("steps", 2)) if n in given}
        given |= {"samples": 2} if entry["class_type"] == "IterisMerge" else {}
    outputs = client.run(graph)
    said = {text for shown in outputs.values() for text in shown.get("text", ())}
    assert any("iteris/merged" in text for text in said)
    assert any(shown.get("images") for shown in outputs.values())


def test_a_graph_of_an_earlier_version_opens(client, tmp_path):
    """Its values go to the inputs of their names; without names, there is a note. A file that is
    gone is no error in a row that is off."""

    def node(number, kind, values, names=()):
        inputs = [{"name": n, "type": "*", "widget": {"name": n}, "link": None} for n in names]
        return {
            "id": number, "type": kind, "pos": [500 * number, 0], "size": [300, 300], "flags": {},
            "order": number, "mode": 0, "inputs": inputs, "outputs": [], "properties": {},
            "widgets_values": values,
        }  # fmt: skip

    names = ("density", "rank", "gone", "image_size", "repair", "block_steps")
    nodes = [
        node(1, "IterisSettings", [0.2, 16, "x", 64, False, 120, "a text"], names),
        node(2, "IterisMerge", ["iteris", 4, "default", 0, 1.0]),
        node(3, "IterisLoras", ["gone.safetensors", False], ("lora_1", "on_1")),
        node(4, "IterisCompareMerges", ["base, sum, ties", 3], ("methods", "samples")),
        node(5, "IterisResizeLora", [0, 10, 0], ("rank", "megabytes", "energy")),
    ]
    graph = {"last_node_id": 5, "last_link_id": 0, "nodes": nodes, "links": [], "version": 0.4}
    (tmp_path / "old.json").write_text(json.dumps(graph))
    seen = look(client, tmp_path / "old.json", tmp_path / "old.png")
    values = seen["values"]["IterisSettings"]
    assert (values["rank"], values["image_size"], values["repair"]) == (16, 64, False)
    assert (values["denoising_steps"], values["steps"], values["kept"]) == (6, -1, "use")
    assert seen["values"]["IterisMerge"]["preset"] == "default"
    compared = seen["values"]["IterisCompareMerges"]
    rows = [compared[f"row_{number}"] for number in range(1, 7)]
    assert (rows, compared["samples"]) == (["base", "stacked", "ties", *["none"] * 3], 3)
    resized = seen["values"]["IterisResizeLora"]
    assert (resized["target"], resized["megabytes"]) == ("megabytes", 10)
    assert seen["values"]["IterisLoras"]["lora_1"] == "gone.safetensors"
    assert "missing a required model" not in seen["text"]
    (note,) = seen["toasts"]
    assert "Node 2 was saved by a version with other inputs" in note


@pytest.mark.parametrize("kind", ["old", "vue"])
def test_a_hostile_graph_is_text(client, models, tmp_path, kind):
    """Reports in a graph, names of files and words: nothing of them is HTML or a link, in texts
    that a graph brings, in those of a run, and in menus."""
    script = "<img src=hostile onerror='window.hostile = 1'>"
    report = f"{script}\n![x](https://hostile/1.png) [y](https://hostile) https://hostile *z*"
    file = f"{script.replace('/', '')}.safetensors"
    loras = models / "models" / "loras"
    shutil.copy(loras / "a.safetensors", loras / file)

    def node(number, kind, values=(), **more):
        return {
            "id": number, "type": kind, "pos": [450 * (number % 4), 450 * (number // 4)],
            "size": [400, 350], "flags": {}, "order": number, "mode": 0, "inputs": [],
            "outputs": [], "properties": {"iteris_report": report},
            "widgets_values": list(values), **more,
        }  # fmt: skip

    names = ("lora_1", "on_1", "strength_1", "clip_1", "weight_1", "prompts_1", "words_1")
    widgets = [{"name": n, "type": "*", "widget": {"name": n}, "link": None} for n in names]
    words = [{"name": "concepts", "type": "ITERIS_CONCEPTS", "links": []}]
    words.append({"name": "trigger_words", "type": "STRING", "links": [1]})
    row = [file, True, 1, 1, 1, "auto", script]
    shown = {"inputs": [{"name": "source", "type": "*", "link": 1}]}
    nodes = [
        node(1, "KSampler"), node(2, "IterisMerge", title=report), node(3, "IterisConcept"),
        node(4, "IterisLoras", row, inputs=widgets, outputs=words), node(5, "PreviewAny", **shown),
        node(6, "IterisSaveLora"), node(7, "IterisInspectLoras", properties={"iteris_report": 5}),
    ]  # fmt: skip
    graph = {
        "last_node_id": 7, "last_link_id": 1, "nodes": nodes, "version": 0.4,
        "links": [[1, 4, 1, 5, 0, "STRING"]],
    }  # fmt: skip
    (tmp_path / "hostile.json").write_text(json.dumps(graph))
    try:
        for wishes in ([], ["run", "menus"]):
            seen = look(client, tmp_path / "hostile.json", tmp_path / f"{kind}.png", kind, *wishes)
            assert seen["hostile"] == []
            assert wishes or seen["errors"] == []  # a menu of Nodes 2.0 may have errors of its own
            assert report.split("\n")[1] in seen["text"]
    finally:
        (loras / file).unlink()
    assert f"{file.removesuffix('.safetensors')} at 1" in seen["text"]
    assert sum(file.replace("<", "‹") in entry.replace("<", "‹") for entry in seen["entries"]) == 2


def test_reports_are_on_their_nodes(client, tmp_path):
    """One of a subgraph's node is not on the node of that number outside. One of a run is not on a
    node of a graph that was opened meanwhile, and no picture has that of the run before."""
    name = "Merge LoRAs and draw (IterIS)"
    graph = json.loads((ROOT / "subgraphs" / f"{name}.json").read_text())
    (inner,) = graph["definitions"]["subgraphs"]
    merge = next(node for node in inner["nodes"] if node["type"] == "IterisMerge")
    merge["properties"]["iteris_report"] = "a report inside"
    outside = {**merge, "inputs": [], "outputs": [], "properties": {}, "pos": [900, 0]}
    graph["nodes"].append(outside)
    graph["last_node_id"] = max(node["id"] for node in graph["nodes"])
    (tmp_path / "reports.json").write_text(json.dumps(graph))
    seen = run("reports.js", client, tmp_path / "reports.json", merge["id"])
    assert seen["errors"] == []
    assert "a report inside" not in seen["outside"]
    assert "a report inside" in seen["inside"]
    assert "a report inside" not in seen["sent"]
    assert "IterisMerge" in seen["sent"]
    assert (seen["other"], seen["first"]) == (None, "a report that came late")


def test_a_comparison_in_one_press(client):
    """Beside a merge that draws two prompts. It covers nothing, its picture is large, and every row
    has both prompts. The merge is found by what it does."""
    seen = run("comparison.js", client, ROOT / "workflows" / "quick_start_toybox.json")
    assert seen["errors"] == []
    assert "IterIS Merge LoRAs" in seen["found"]
    added = seen["added"]
    for one, two in [*combinations(added, 2), *product(added, seen["before"])]:
        a, b = one["box"], two["box"]
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one["type"], two["type"])
    (shown,) = (node["box"] for node in added if node["type"] == "PreviewImage")
    assert (shown[2] - shown[0], shown[3] - shown[1]) >= (600, 500)
    ids = {node["type"]: str(node["id"]) for node in added[::-1]}
    graph = seen["prompt"]
    compare, wanted = ids["IterisCompareMerges"], {ids["PreviewImage"]}
    assert graph[ids["CLIPTextEncode"]]["inputs"]["text"] == [compare, 4]
    graph[compare]["inputs"] |= {"row_4": "average"}  # which takes no time
    graph[ids["KSampler"]]["inputs"]["steps"] = 2
    while (
        more := {
            value[0]
            for number in wanted
            for value in graph[number]["inputs"].values()
            if isinstance(value, list)
        }
        - wanted
    ):
        wanted |= more
    outputs = client.run({number: graph[number] for number in wanted})
    (sheet,) = outputs[ids["PreviewImage"]]["images"]
    with Image.open(io.BytesIO(client.picture(sheet))) as picture:
        width, height = picture.size
    # Four pictures of either prompt, and five rows.
    assert (width // 192, height // 192) == (8, 5)


def test_what_a_run_says_is_for_who_runs_it(client):
    """On their own page and graph alone; after a cancel the node says what is kept."""
    seen = run("people.js", client, ROOT / "workflows" / "quick_start_toybox.json")
    assert seen["errors"] == []
    assert any("no row left out" in text for text in seen["running"])
    assert seen["theirs"] == {"told": [], "same": True, "heard": []}
    assert seen["others"] == {"told": [], "same": True}
    assert any("Merged 2 concepts" in text for text in seen["done"])
    assert any("min left" in text for text in seen["steps"])
    stopped = [text for text in seen["stopped"] if text.startswith("IterisMerge")]
    assert len(stopped) == 1
    assert re.search(
        r"Stopped at steps through the denoiser \d+ of 200\. The merge is kept", stopped[0]
    )
    assert "left" not in stopped[0]


def test_help_page_renders(client, tmp_path):
    seen = look(
        client, ROOT / "workflows" / "quick_start_toybox.json", tmp_path / "help.png",
        "help", "IterisMerge",
    )  # fmt: skip
    assert "Merges the concepts into one LoRA" in seen["text"].replace("\n", " ")
    assert seen["pictures"] == [["/extensions/iteris-lora/docs/IterisMerge/en.jpg", True]]
