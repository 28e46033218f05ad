"""Real prompts on a real server, as a user of the pack would run them."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from client import PromptError, node
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
ADVANCED = {"ridge": 1e-5, "timesteps": 2, "image_size": 64}
needs_toybox = pytest.mark.skipif(
    not (ROOT / "toybox" / "weights" / "loras").is_dir(), reason="the toybox has no LoRAs yet"
)


def concept(lora, **given):
    values = {"trigger": "", "class_word": "", "prompts": "", "embedding": "none"}
    values |= {"strength": 1.0, "weight": 1.0, "lora_name": lora}
    return node("IterisConcept", **(values | given))


def thin_graph(samples=3, **advanced):
    """Both thin LoRAs merged and saved, and a picture."""
    graph = {
        "base": node("CheckpointLoaderSimple", ckpt_name="thin.safetensors"),
        "a": concept("a.safetensors"),
        "b": concept("b.safetensors", trigger="zwx", class_word="dog", concepts=["a", 0]),
        "merge": node(
            "IterisMerge", model=["base", 0], clip=["base", 1], concepts=["b", 0], method="iteris",
            samples=samples, settings=["settings", 0],
        ),
        "settings": node("IterisSettings", **(ADVANCED | advanced)),
        "save": node("IterisSaveLora", lora=["merge", 2], filename_prefix="iteris/thin"),
        "report": node("PreviewAny", source=["merge", 3]),
    }  # fmt: skip
    return graph | drawing("merged", ["merge", 0], ["merge", 1], ["base", 2])


def drawing(name, model, clip, vae, text="a sks cat", **more):
    """Nodes that draw; the pictures are shown by the node ``name``."""
    settings = {"seed": 1, "steps": 2, "cfg": 3.0, "denoise": 1.0}
    settings |= {"sampler_name": "euler", "scheduler": "simple"}
    batch = more.pop("batch", 1)
    return {
        f"{name}+": node("CLIPTextEncode", clip=clip, text=text),
        f"{name}-": node("CLIPTextEncode", clip=clip, text=""),
        f"{name}0": node("EmptyLatentImage", width=64, height=64, batch_size=batch),
        f"{name}k": node(
            "KSampler", model=model, positive=[f"{name}+", 0], negative=[f"{name}-", 0],
            latent_image=[f"{name}0", 0], **(settings | more),
        ),
        f"{name}d": node("VAEDecode", samples=[f"{name}k", 0], vae=vae),
        name: node("PreviewImage", images=[f"{name}d", 0]),
    }  # fmt: skip


def stock(lora, model, clip):
    """ComfyUI's own loader."""
    strengths = {"strength_model": 1.0, "strength_clip": 1.0}
    return node("LoraLoader", model=model, clip=clip, lora_name=lora, **strengths)


def pixels(client, shown):
    files = [client.picture(image) for image in shown["images"]]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)), dtype=float) for file in files])


def psnr(found, wanted):
    error = float(((found - wanted) ** 2).mean())
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def saved_name(outputs):
    return outputs["save"]["text"][0]


def test_saved_lora_draws_what_the_node_draws(client):
    outputs = client.run(thin_graph())
    assert "34 sites" in outputs["report"]["text"][0]
    assert "sks" in outputs["report"]["text"][0]  # from the file's folder name
    base = ["base", 0], ["base", 1]
    graph = {
        "base": node("CheckpointLoaderSimple", ckpt_name="thin.safetensors"),
        "lora": stock(saved_name(outputs), *base),
        **drawing("loaded", ["lora", 0], ["lora", 1], ["base", 2]),
        **drawing("plain", *base, ["base", 2]),
    }
    drawn = client.run(graph)
    merged = pixels(client, outputs["merged"])
    assert psnr(pixels(client, drawn["loaded"]), merged) > 45
    assert psnr(pixels(client, drawn["plain"]), merged) < 40


def test_the_prompt_of_the_documentation(client, models):
    """Run twice it merges once, and writes one file. Older graphs say clear to merge again."""
    page = (ROOT / "docs" / "comfyui.md").read_text(encoding="utf-8")
    graph = json.loads(page.partition("```json")[2].partition("```")[0])
    graph["1"]["inputs"]["ckpt_name"] = "thin.safetensors"
    graph["2"]["inputs"] = {"lora_1": "a.safetensors", "lora_2": "b.safetensors"}
    graph["3"]["inputs"] |= {"samples": 2, "settings": ["settings", 0]}
    graph["4"]["inputs"]["filename_prefix"] = "shortest"
    log = models / "server.log"
    before = log.read_text().count("IterIS: merged with")
    for overwrite, kept in ((False, "clear"), (True, "use")):
        graph["4"]["inputs"]["overwrite"] = overwrite
        graph["settings"] = node("IterisSettings", **ADVANCED, kept=kept)
        assert client.run(graph)["4"]["text"] == ["shortest.safetensors"]
    assert log.read_text().count("IterIS: merged with") == before + 1
    assert len([*(models / "models" / "loras").glob("shortest*")]) == 1


def test_a_drawing_that_fails_loses_nothing(client, models):
    """The merged LoRA is written before its thumbnail is drawn."""
    graph = {
        name: made for name, made in thin_graph(samples=2).items() if not name.startswith("merged")
    }
    graph["none"] = node("ReducedModel", name="no_such_model", factor=1.0)
    graph |= drawing("failing", ["none", 0], ["merge", 1], ["base", 2])
    graph["save"]["inputs"] |= {"filename_prefix": "early", "thumbnail": ["failingd", 0]}
    del graph["failing"]
    with pytest.raises(PromptError, match="no_such_model"):
        client.run(graph)
    assert (models / "models" / "loras" / "early.safetensors").is_file()


def test_stock_save_checkpoint_bakes_the_merge(client, models):
    """MODEL and CLIP of a merge in one file, which draws what they draw without a LoRA."""
    merged = ["merge", 0], ["merge", 1], ["base", 2]
    graph = thin_graph()
    names = dict(zip(("model", "clip", "vae"), merged, strict=True))
    graph["bake"] = node("CheckpointSave", filename_prefix="checkpoints/baked", **names)
    wanted = pixels(client, client.run(graph)["merged"])
    (file,) = (models / "output" / "checkpoints").glob("baked*.safetensors")
    file.rename(models / "models" / "checkpoints" / "baked.safetensors")
    graph = {
        name: node("CheckpointLoaderSimple", ckpt_name=f"{name}.safetensors")
        for name in ("baked", "thin")
    }
    for name in list(graph):
        graph |= drawing(f"by {name}", [name, 0], [name, 1], [name, 2])
    drawn = client.run(graph)
    assert psnr(pixels(client, drawn["by baked"]), wanted) > 45
    assert psnr(pixels(client, drawn["by thin"]), wanted) < 40


def test_errors_are_one_sentence(client):
    with pytest.raises(PromptError, match="no concept sks99"):
        client.run({
            "toybox": node("IterisToybox", tokens="sks99"),
            "shown": node("PreviewAny", source=["toybox", 3]),
        })  # fmt: skip


@needs_toybox
def test_a_list_of_eight(client, models):
    """A missing one that is off does not refuse the graph, and two without words act on every
    prompt: they are always on."""
    loras = ROOT / "toybox" / "weights" / "loras"
    into = models / "models" / "loras" / "eight"
    into.mkdir()
    names = [f"sks{number}.safetensors" for number in range(1, 6)]
    for name in names:
        shutil.copy(loras / name, into / name)
    for name, of in (("watercolor_style", "sks6"), ("detail_slider", "sks7")):
        names.append(f"{name}.safetensors")
        save_file(load_file(loras / f"{of}.safetensors"), into / names[-1])
    rows = {f"lora_{row}": f"eight/{name}" for row, name in enumerate([*names, "gone.sft"], 1)}
    graph = {
        "toybox": node("IterisToybox", tokens="sks1"),
        "loras": node("IterisLoras", **rows, on_8=False),
        "settings": node("IterisSettings", latents="noise", timesteps=1),
        "merge": node(
            "IterisMerge", model=["toybox", 0], clip=["toybox", 1], concepts=["loras", 0],
            samples=2, settings=["settings", 0],
        ),
        "save": node("IterisSaveLora", lora=["merge", 2], filename_prefix="iteris/eight"),
        "words": node("PreviewAny", source=["merge", 4]),
    }  # fmt: skip
    outputs = client.run(graph)
    assert outputs["merge"]["text"][0].partition(":")[0] in ("Strong", "Fair", "Weak")
    whole = outputs["merge"]["report"][0].partition("  Planned: about ")[2]
    _, merged, *notes = whole.splitlines()
    assert merged.startswith("Merged 5 concepts")
    on = [note for note in notes if "no trigger word, so it acts on every prompt" in note]
    assert {note.split(":")[0].strip() for note in on} == {"watercolor_style", "detail_slider"}
    words = outputs["words"]["text"][0]
    assert words == "sks1 star, sks2 star, sks3 star, sks4 circle, sks5 circle"
    assert (models / "models" / "loras" / saved_name(outputs)).is_file()
    graph["loras"]["inputs"]["on_8"] = True
    with pytest.raises(PromptError, match=r"There is no LoRA eight/gone\.sft in models/loras"):
        client.run(graph)


@needs_toybox
def test_compare_inspect_preserve_and_stack(client):
    toybox = ["toybox", 0], ["toybox", 1], ["toybox", 3]
    graph = {
        "toybox": node("IterisToybox", tokens="sks1, sks2"),
        "kept": node(
            "IterisPreservePrompts", prompts="a red ring\na ring", weight=0.2, concepts=toybox[2]
        ),
        "compared": node(
            "IterisCompareMerges", model=toybox[0], clip=toybox[1], concepts=["kept", 0],
            row_1="base", row_2="each alone", row_3="stacked", row_4="iteris", samples=10,
            settings=["settings", 0],
        ),
        "settings": node("IterisSettings", timesteps=1, latents="noise"),
        **drawing("drawn", ["compared", 0], ["compared", 1], ["toybox", 2], batch=2),
        "sheet": node(
            "IterisScoreSheet", images=["drawnd", 0], labels=["compared", 2], prompts="", cell=64
        ),
        "shown": node("PreviewImage", images=["sheet", 0]),
        "inspected": node(
            "IterisInspectLoras", model=toybox[0], clip=toybox[1], concepts=toybox[2],
            settings=["settings", 0],
        ),
        "table": node("PreviewAny", source=["inspected", 1]),
        "score": node(
            "IterisClipTextAlignment", scorer=["toybox", 6], images=["drawnd", 0],
            prompts="a sks1 star", leave_out="sks1",
        ),
        "scores": node("PreviewAny", source=["score", 2]),
    }  # fmt: skip
    outputs = client.run(graph)
    assert len(outputs["drawn"]["images"]) == 10  # two LoRAs, each alone
    assert "overlap" in outputs["table"]["text"][0]
    assert "CLIPScore" in outputs["scores"]["text"][0]


@needs_toybox
def test_every_row_draws_every_prompt_of_a_list(client):
    """ComfyUI pairs lists by place: two prompts and three rows would be three pictures."""
    toybox = {"model": ["toybox", 0], "clip": ["toybox", 1], "concepts": ["toybox", 3]}
    on = ["rows", 0], ["rows", 1], ["toybox", 2]
    drawn = drawing("drawn", *on, text=["rows", 4], batch=2)
    outputs = client.run({
        "toybox": node("IterisToybox", tokens="sks1, sks6"),
        "rows": node(
            "IterisCompareMerges", **toybox, row_1="each alone", row_2="average", row_3="none",
            row_4="none", prompt=["toybox", 5],
        ),
        **drawn,
        "said": node("PreviewAny", source=["rows", 4]),
        "sheet": node(
            "IterisScoreSheet", images=["drawnd", 0], labels=["rows", 2], prompts=["rows", 4],
            cell=64,
        ),
        "shown": node("PreviewImage", images=["sheet", 0]),
    })  # fmt: skip
    assert outputs["said"]["text"] == ["a sks1 star"] * 3 + ["a sks6 square"] * 3
    assert len(outputs["drawn"]["images"]) == 12
    (sheet,) = outputs["shown"]["images"]
    width, height = Image.open(io.BytesIO(client.picture(sheet))).size
    assert 4 * 64 < width < 6 * 64
    assert 3 * 64 < height < 5 * 64


def test_every_node_is_served_with_its_help_and_texts(client):
    """What these say is compared with the nodes by test_texts.py."""
    found = {k: v for k, v in client.get("/object_info").items() if k.startswith("Iteris")}
    texts = client.get("/i18n")
    assert len(found) == 17
    for name, info in found.items():
        assert info["category"].split("/")[0] == "IterIS"
        assert all(info["output_tooltips"])
        inputs = [
            *info["input"].get("required", {}).values(),
            *info["input"].get("optional", {}).values(),
        ]
        assert all(spec[1]["tooltip"] for spec in inputs)
        for page in (f"{name}.md", f"{name}/zh.md"):
            served = client.get(f"/extensions/iteris-lora/docs/{page}")
            assert served == (ROOT / "web" / "docs" / page).read_bytes()
    for folder in (ROOT / "locales").iterdir():
        own = json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))
        assert own.items() <= texts[folder.name]["nodeDefs"].items()
