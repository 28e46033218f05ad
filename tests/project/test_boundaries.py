"""Checks that import-linter (``make lint``) does not cover: how modules import, and the nodes'
imports."""

import ast
import subprocess
import sys
from pathlib import Path

import iteris_core

ROOT = Path(iteris_core.__file__).parent


def test_the_package_imports_itself_relatively_and_nothing_of_comfyui():
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in names:
                first = name.split(".")[0]
                assert first not in ("iteris_core", "nodes", "comfy", "comfy_api", "folder_paths")


def test_only_some_files_of_the_nodes_know_the_inside_of_comfyui():
    """Names of ``comfy`` itself come from comfy_internals, which looks them up."""
    for path in (ROOT.parent / "nodes").glob("*.py"):
        inside = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
        }
        assert "comfy" not in inside, path
        assert path.name.startswith("comfy_") or not inside & {"server", "execution"}, path


def test_the_core_loads_without_its_hosts_libraries():
    blocked = ("comfy", "diffusers", "transformers", "open_clip", "peft", "typer", "matplotlib")
    script = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch, iteris_core
lora = iteris_core.Lora({{"unet.a": iteris_core.LowRank(torch.ones(2, 1), torch.ones(1, 2))}})
merged = iteris_core.merge_loras(None, [iteris_core.Concept(lora)] * 2, "sum").lora
assert float(merged.sites["unet.a"].dense()[0, 0]) == 2.0
"""
    subprocess.run([sys.executable, "-c", script], check=True)
