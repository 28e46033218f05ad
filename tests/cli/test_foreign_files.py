"""Files of others, in every folder that a command writes to, stay as they are."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from bases import make_lora, tiny_base
from command_line import QUICK
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_pipeline

import toybox
from iteris_core import Concept, IterisError, Lora, SampleStore, cli, merge_loras, write_lora
from iteris_core.lora_files.peft_folder import write_adapter

pytestmark = pytest.mark.usefixtures("unmeasured")

FOREIGN = (
    "cat.safetensors", "cat_emb.safetensors", "cat.md", "cat.preview.png", "cat.civitai.info",
    "model.iteris-store", f"{'a' * 63}.safetensors", ".iteris-mine", "unfinished.part", "cat/x.md",
    "folder.safetensors/x.md",
)  # fmt: skip
FOLDERS = ("loras", "out", "temporary", "home", "cache")
CLIP = f"--clip=local-dir:{toybox.ROOT / 'weights' / 'clip'}"
LORAS = "--concept={loras}/one.safetensors:s1:dog", "--concept={loras}/two.safetensors:s2:cat"
MERGE = ("merge", "{base}", *LORAS, *QUICK[:2], "--device=cpu", "--latent-size=4", "-o")
COMMANDS = {
    "merge": [
        (*MERGE, "{out}/m.safetensors", "--card"),
        (*MERGE, "{out}/n.safetensors", "--store={cache}/own/samples", "--method=sum"),
        ("merge", "{base}", "--from={out}/m.safetensors", "--loras={loras}", "--device=cpu",
         "-o", "{out}/again.safetensors"),
        (*MERGE, "{out}/none.safetensors", "--plan"),
    ],
    "inspect": [("inspect", "{loras}/one.safetensors", "{loras}/two.safetensors", "--base={base}")],
    "score": [("score", "{pictures}", "--refs={pictures}", CLIP)],
    "resize": [
        ("resize", "{loras}/one.safetensors", "--rank=2", "-o", "{out}/r.safetensors"),
        ("resize", "{loras}/one.safetensors:s1:dog", "--base={base}", "--rank=2", *QUICK,
         "-o", "{out}/s.safetensors"),
    ],
    "extract": [("extract", "{base}", "{tuned}", "--rank=4", *QUICK, "--latent-size=4",
                 "-o", "{out}/e.safetensors")],
    "convert": [("convert", "{loras}/one.safetensors", "--base={base}", "--layout=peft",
                 "-o", "{out}/c.safetensors")],
    "bake": [("bake", "{checkpoint}", "--lora={loras}/small.safetensors", "-o",
              "{out}/b.safetensors")],
    "methods": [("methods",), ("methods", "iteris")],
    "explain": [("explain",), ("explain", "IT-16")],
    "store": [("store",), ("store", "--clear")],
}  # fmt: skip
WRITING = {name: [words for words in some if "-o" in words] for name, some in COMMANDS.items()}
PLACED = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def places(world, tmp_path, monkeypatch):
    """Folders with files of others, and what the commands take."""
    found = {name: tmp_path / name for name in FOLDERS}
    for folder in found.values():
        for name in FOREIGN:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"{folder} {name}")
    for number, name in enumerate(("one", "two"), 1):
        (found["loras"] / f"{name}.safetensors").write_bytes(
            (world / f"lora{number}.safetensors").read_bytes()
        )
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "pictures" / "a.png")
    for path in tmp_path.rglob("*"):
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(tempfile, "tempdir", str(found["temporary"]))
    monkeypatch.setenv("HOME", str(found["home"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(found["cache"]))
    monkeypatch.delenv("ITERIS_STORE", raising=False)
    monkeypatch.chdir(found["out"])
    return {**found, "base": world / "base", "pictures": tmp_path / "pictures"}


def seen(places) -> dict[Path, tuple[bytes, int]]:
    """Contents and times of all files."""
    paths = [path for name in (*FOLDERS, "pictures") for path in places[name].rglob("*")]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths if path.is_file()}


def filled(words, places) -> list[str]:
    return [word.format(**places) for word in words]


def test_every_command_is_run():
    """``demo`` in ``test_demo.py``."""
    assert {*COMMANDS, "demo"} == {one.callback.__name__ for one in cli.app.registered_commands}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_leaves_the_files_of_others(name, places, tmp_path, iteris, monkeypatch):
    if name == "bake":
        monkeypatch.setattr(sys.modules["iteris_core.cli.files"], "released_base",
                            lambda _: tiny_base("sd1"))  # fmt: skip
        site = f"unet.{PLACED}"
        write_lora(make_lora("sd1", [site]), places["loras"] / "small.safetensors")
        key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        places["checkpoint"] = tmp_path / "model.safetensors"
        save_file({key: torch.zeros(tiny_base("sd1").shapes[site])}, places["checkpoint"])
    if name == "extract":
        tuned = make_pipeline()
        tuned.unet.get_submodule(PLACED).weight.data.add_(0.1 * torch.eye(*tuned.unet.get_submodule(
            PLACED).weight.shape))  # fmt: skip
        tuned.save_pretrained(tmp_path / "tuned")
        places["tuned"] = tmp_path / "tuned"
    before = seen(places)
    for words in COMMANDS[name]:
        iteris(*filled(words, places))
    after = seen(places)
    assert {path: after.get(path) for path in before} == before
    new = {path.relative_to(tmp_path).parts[0] for path in after.keys() - before.keys()}
    written = {"out"} if WRITING[name] else set()
    assert new - {"out", "cache"} == set()  # none beside the LoRAs, nor in the temporary folder
    assert written <= new
    for words in WRITING[name]:
        target = words[: words.index("-o")], words[words.index("-o") + 2 :]
        message = iteris.refused(
            *filled((*target[0], "-o", "{out}/cat.safetensors", *target[1]), places)
        )
        assert "cat.safetensors exists already" in message
        message = iteris.refused(
            *filled((*target[0], "-o", "{out}/folder.safetensors", "--overwrite"), places)
        )
        assert "folder.safetensors is a folder" in message
    assert {path: seen(places).get(path) for path in before} == before


def test_python_leaves_the_files_of_others(places, host):
    before = seen(places)
    lora = host.read_lora(places["loras"] / "one.safetensors")
    result = merge_loras(None, [Concept(lora, trigger="s1")], "sum")
    attempts = (
        lambda: result.save(places["out"] / "cat.safetensors"),
        lambda: write_lora(Lora(lora.sites, embeddings={"word": {"clip_l": torch.ones(1, 4)}}),
                           places["out"] / "cat.safetensors"),
        lambda: write_adapter(lora, places["out"] / "cat"),
        lambda: SampleStore(places["loras"]),
    )  # fmt: skip
    for attempt in attempts:
        with pytest.raises(IterisError):
            attempt()
    saved = result.save(places["out"] / "new.safetensors")
    assert load_file(saved)
    store = SampleStore(places["cache"] / "samples", limit=1)
    for key in "ab":
        store.put({"latents": torch.ones(4)}, key)
    store.clear()
    assert {path: seen(places).get(path) for path in before} == before
