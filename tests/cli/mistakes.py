"""The mistakes in ``mistakes.txt``, their files and their command lines."""

import json
import shlex
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from command_line import make_world
from PIL import Image
from safetensors.torch import load_file, save_file

from iteris_core.lora_files.tensors import file_digest


def make_mess(folder: Path) -> dict[str, str]:
    """What the cases name in braces."""
    world, tmp = folder / "world", folder / "mess"
    world.mkdir()
    tmp.mkdir()
    make_world(world)
    one = world / "lora1.safetensors"
    good = one.read_bytes()
    texts = {
        "pointer.safetensors": "version https://git-lfs.github.com/spec/v1\n",
        "letter.safetensors": "this is not a LoRA, it is a letter to you all",
        "lines.txt": "a photo\na house\n", "empty.txt": "", "blank.txt": " \n\n",
        "nine.txt": "a {9}\n", "mine.yaml": "mine",
    }  # fmt: skip
    data = {
        "cut.safetensors": good[: len(good) // 2],
        "huge.safetensors": struct.pack("<Q", 1 << 62) + b"{}",
        "zeros.txt": b"a\0b\n",
        "latin.txt": "caf\xe9\n".encode("latin-1"), "latin.yaml": "b: caf\xe9\n".encode("latin-1"),
        "pickle.safetensors": b"\x80\x04K\x01.",
        "zip.safetensors": b"PK\3\4" + bytes(100),
    }  # fmt: skip
    for name, text in texts.items():
        (tmp / name).write_text(text)
    for name, content in data.items():
        (tmp / name).write_bytes(content)
    for name in ("empty", "pics", "others"):
        (tmp / name).mkdir()
    Image.new("RGB", (8, 8)).save(tmp / "pics" / "a.png")
    Image.new("RGB", (8, 8)).save(tmp / "pics" / "b.png")
    tensors = load_file(one)
    whole = {f"model.diffusion_model.input_blocks.{i}.weight": torch.ones(2) for i in range(9)}
    save_file(whole, tmp / "model.safetensors")
    save_file({}, tmp / "nothing.safetensors")
    save_file({"emb_params": torch.ones(1, 32)}, tmp / "emb.safetensors")
    save_file({k: t * float("nan") for k, t in tensors.items()}, tmp / "nan.safetensors")
    first = min(key for key in tensors if key.endswith("lora_up.weight"))
    save_file({k: t for k, t in tensors.items() if k != first}, tmp / "part.safetensors")
    (tmp / "with_emb.safetensors").write_bytes(good)
    save_file({"emb_params": torch.ones(1, 32)}, tmp / "with_emb_emb.safetensors")
    (tmp / "mine_emb.safetensors").write_text("mine")
    recipe = {
        "method": "iteris", "settings": {}, "calibration": {},
        "concepts": [{"file": one.name, "trigger": "s1", "sha256": file_digest(one)}],
    }  # fmt: skip
    concept = recipe["concepts"][0]
    recipes = {
        "merged": recipe,
        "broken": {**recipe, "concepts": 3},
        "unhashed": {**recipe, "concepts": [{**concept, "sha256": ""}]},
        "reading": {**recipe, "concepts": [{**concept, "reading": {"blocks": 5}}]},
        "loose": {**recipe, "concepts": [{**concept, "file": None, "lora": "mine"}]},
        "away": {**recipe, "concepts": [{**concept, "file": str(one)}]},
    }
    for name, one_recipe in recipes.items():
        save_file(tensors, tmp / f"{name}.safetensors", {"iteris": json.dumps(one_recipe)})
    (tmp / "others" / one.name).write_bytes((world / "lora2.safetensors").read_bytes())
    places = {name: tmp / f"{name}.safetensors" for name in recipes}
    return {name: str(path) for name, path in {
        **places, "changed": places["merged"], "world": world, "tmp": tmp, "one": one,
        "base": world / "base", "empty": tmp / "empty", "pics": tmp / "pics",
        "pic": tmp / "pics" / "a.png", "lora": tmp / "model.safetensors",
    }.items()}  # fmt: skip


_LINES = (Path(__file__).parent / "mistakes.txt").read_text(encoding="utf-8").splitlines()
CASES = [line.split(" => ") for line in _LINES if " => " in line]
"""(what is typed, a part of the answer)"""

FORMS = {
    "M": "merge {base} -o {out} --device cpu --concept {one}:s1:dog",
    "L": "merge {base} -o {out} --device cpu --concept",
    "F": "merge {base} -o {out} --loras {world} --from",
}
"""What a case begins with, for short."""

GOOD = 'base: {base}\nconcepts: ["{one}:s1:dog"]\n'
"""What a merge file has before the lines of a case ``Z``."""


def arguments_of(case: str, places: Mapping[str, str], folder: Path) -> list[str]:
    """The words of the command line; what follows ``Y`` is a merge file, ``Z`` the rest of one."""
    first, _, rest = case.partition(" ")
    out = folder / "out.safetensors"
    names = {**places, "out": str(out)}
    if first in "YZ":
        text = (GOOD if first == "Z" else "") + rest.removeprefix("|").replace("\\n", "\n")
        (folder / "merge.yaml").write_text(filled(text, names))
        return ["merge", str(folder / "merge.yaml"), "-o", str(out)]
    return [filled(word, names) for word in shlex.split(f"{FORMS.get(first, first)} {rest}")]


def filled(text: str, names: Mapping[str, str]) -> str:
    for name, path in names.items():
        text = text.replace(f"{{{name}}}", path)
    return text


def contents(*folders: Path) -> dict[Path, bytes]:
    paths = [path for folder in folders for path in folder.rglob("*")]
    return {path: path.read_bytes() for path in paths if path.is_file()}
