"""A missing ComfyUI name: the other nodes still load, and code that needs it reports it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from kit import merge_on

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def again(library: None) -> Iterator[Any]:
    """The pack, imported anew under another name."""
    name = "custom-nodes/iteris-once-more"
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None

    def load() -> ModuleType:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return importlib.import_module(f"{name}.nodes")

    yield load
    for known in [key for key in sys.modules if key.partition(".")[0] == name]:
        del sys.modules[known]


def test_all_are_there(pack: ModuleType) -> None:
    internals = importlib.import_module(f"{pack.__name__}.nodes.comfy_internals")
    assert internals.missing() == []


@pytest.mark.parametrize(
    "path",
    [
        "comfy.samplers.calc_cond_batch",
        "comfy.samplers.CFGGuider",  # a base class
        "comfy.supported_models.SD15",
        "comfy.sd1_clip.SDTokenizer",
        "comfy.model_patcher.ModelPatcher.pre_run",
    ],
)
def test_one_is_gone(
    again: Any, path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    owner, _, name = path.rpartition(".")
    parts = owner.split(".")[1:]
    found: Any = sys.modules["comfy"]
    for part in parts:
        found = getattr(found, part)
    monkeypatch.delattr(found, name)
    caplog.set_level(logging.WARNING)
    nodes = again()
    assert len(nodes.NODES) == 18
    for node in nodes.NODES:
        assert node.define_schema().node_id
    assert f"has no {path}" in caplog.text
    assert "0.8.0 and 0.33.0 are known to work" in caplog.text


def test_what_needs_it_says_so_and_the_rest_works(
    again: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.samplers
    import folder_paths
    from thin_models import load_thin

    monkeypatch.delattr(comfy.samplers, "calc_cond_batch")
    known = folder_paths.folder_names_and_paths["loras"][1]
    folder = str(models / "models" / "loras")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([folder], known))
    again()
    name = "custom-nodes/iteris-once-more"
    merging, stacks, core = (
        importlib.import_module(f"{name}.{part}")
        for part in ("nodes.merging", "nodes.lora_stacks", "iteris_core")
    )
    specs = stacks.with_words(stacks.specs_of([("a", 1.0), ("b", 1.0)]), "sks cat; zwx dog")
    model, clip = load_thin(models)
    calibration = core.Calibration(samples=1, timesteps=1, latents="noise", latent_size=8)
    with pytest.raises(core.IterisError, match=r"no comfy\.samplers\.calc_cond_batch"):
        merge_on(merging, model, clip, specs, "iteris", {}, calibration)
    assert merge_on(merging, model, clip, specs, "average", {}, calibration).lora.sites


def test_an_old_comfyui_is_told_what_it_lacks(
    again: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import folder_paths  # noqa: F401

    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    with pytest.raises(ImportError):
        again()  # looks for the nodes, which are not imported
    assert sys.modules["custom-nodes/iteris-once-more"].__all__ == []
    assert "needs ComfyUI 0.3.77 or newer" in caplog.text


def test_an_old_python_is_told_so(
    again: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import folder_paths  # noqa: F401

    monkeypatch.setattr(sys, "version_info", (3, 9, 21, "final", 0))
    again()
    assert sys.modules["custom-nodes/iteris-once-more"].__all__ == []
    assert "needs Python 3.10 or newer" in caplog.text


def test_they_are_taken_in_one_module() -> None:
    """No other file of the nodes imports from comfy."""
    for file in sorted((ROOT / "nodes").glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [
            name
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            if not getattr(node, "level", 0)
        ]
        assert not [name for name in names if name.partition(".")[0] == "comfy"], file.name
