"""Checks that import-linter (``make lint``) does not cover: how modules import, and the nodes'
imports."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

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


def imported(folder: Path) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """Module → the modules of ``folder`` that it imports, also in functions and for types."""
    package = (folder.name,) if (folder / "__init__.py").exists() else ()
    files = {}
    for path in folder.rglob("*.py"):
        *parents, name = (*package, *path.relative_to(folder).with_suffix("").parts)
        files[(*parents,) if name == "__init__" else (*parents, name)] = path
    found = {name: set() for name in files}
    for name, path in files.items():
        here = name if path.name == "__init__.py" else name[:-1]
        scripts = () if (path.parent / "__init__.py").exists() else here
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            targets = []
            if isinstance(node, ast.Import):
                targets = [(*alias.name.split("."),) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = here[: len(here) + 1 - node.level] if node.level else ()
                base += (*(node.module or "").split("."),) if node.module else ()
                targets = [(*base, alias.name) for alias in node.names]
            for target in targets:
                known = (
                    whole[:end]
                    for whole in ((*scripts, *target), target)
                    for end in range(len(whole), len(whole) - len(target), -1)
                    if whole[:end] in files
                )
                found[name] |= {next(known, name)} - {name}
    return found


def circles(folder: Path) -> list[str]:
    """Of modules and of folders beside each other; a package's own may import its names."""
    beside = defaultdict(lambda: defaultdict(set))
    for name, others in imported(folder).items():
        for other in others:
            two = enumerate(zip(name, other, strict=False))
            same = next((i for i, (one, another) in two if one != another), None)
            if same is not None:
                beside[name[:same]][name[same]].add(other[same])
    found = []
    for place, edges in beside.items():
        try:
            TopologicalSorter(edges).prepare()
        except CycleError as error:
            found.append(f"{'.'.join(place)}: {' <- '.join(error.args[1])}")
    return found


@pytest.mark.parametrize("name", ["benchmarks", "nodes", "toybox"])
def test_nothing_imports_in_a_circle(name):
    """As the contract ``acyclic_siblings`` of the core."""
    folder = ROOT.parent / name
    assert sum(map(len, imported(folder).values())) > 20
    assert circles(folder) == []
