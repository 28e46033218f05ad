"""A missing ComfyUI name: the other nodes still load, and code that needs it reports it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import sys
from pathlib import Path

import pytest
from kit import SETTINGS, node, part

ROOT = Path(__file__).resolve().parents[2]
NAME = "custom-nodes/iteris-once-more"


@pytest.fixture
def again(library):
    """The pack, imported anew under another name."""
    spec = importlib.util.spec_from_file_location(
        NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None

    def load():
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
        return importlib.import_module(f"{NAME}.nodes")

    yield load
    for known in [key for key in sys.modules if key.partition(".")[0] == NAME]:
        del sys.modules[known]


def test_all_are_there(pack, kit):
    internals = part(pack, "nodes.comfy_internals")
    assert internals.missing() == []
    encoder = kit.clip.cond_stage_model.clip_l
    for made in (kit.model, kit.clip, encoder, kit.clip.tokenizer.clip_l):
        kinds = [f"{kind.__module__}.{kind.__name__}" for kind in type(made).__mro__]
        (names,) = (internals.ATTRIBUTES[kind] for kind in kinds if kind in internals.ATTRIBUTES)
        assert [name for name in names if not hasattr(made, name)] == []


@pytest.mark.parametrize(
    "path",
    [
        "comfy.samplers.CFGGuider",  # a base class
        "comfy.model_patcher.ModelPatcher.pre_run",
    ],
)
def test_one_is_gone(again, path, monkeypatch, caplog):

    owner, _, name = path.rpartition(".")
    monkeypatch.delattr(functools.reduce(getattr, owner.split(".")[1:], sys.modules["comfy"]), name)
    caplog.set_level(logging.WARNING)
    nodes = again()
    assert len(nodes.NODES) == 17
    assert all(one.define_schema().node_id for one in nodes.NODES)
    assert f"has no {path}" in caplog.text
    assert "0.8.0 and 0.33.0 are known to work" in caplog.text


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("samplers", "calc_cond_batch"),
        ("utils", "pack_latents"),  # came with process_conds' latent_shapes, after 0.3.66
    ],
)
def test_what_needs_it_says_so_and_the_rest_works(again, kit, module, name, monkeypatch):
    monkeypatch.delattr(sys.modules[f"comfy.{module}"], name)
    again()
    found = sys.modules[NAME]
    error, specs = part(found, "iteris_core").IterisError, part(found, "nodes.concept_specs")
    concepts = [specs.make_spec(c.file, trigger=c.trigger) for c in kit.concepts()]
    merge = node(found, "merge_nodes", "IterisMerge").execute
    given = {"clip": kit.clip, "samples": 1, "settings": SETTINGS}
    with pytest.raises(error, match=rf"no comfy\.{module}\.{name}"):
        merge(kit.model, concepts, **given)
    assert merge(kit.model, concepts, method="average", **given).result[2].lora.sites


def test_a_switch_that_this_version_should_have_is_gone(kit, monkeypatch):
    """A merge with its fused kernels would be wrong, and nothing else would say so."""
    import comfy.model_management
    import comfyui_version

    monkeypatch.setattr(comfyui_version, "__version__", "0.99.1")
    monkeypatch.delattr(comfy.model_management, "in_training", raising=False)
    with pytest.raises(kit.core.IterisError, match=r"\(0\.99\.1\) has no .*in_training"):
        kit.merge()


def test_an_old_comfyui_is_told_what_it_lacks(again, monkeypatch, caplog):
    import folder_paths  # noqa: F401

    monkeypatch.setitem(sys.modules, "comfy_api.latest", None)
    with pytest.raises(ImportError):
        again()  # looks for the nodes, which are not imported
    assert sys.modules[NAME].__all__ == []
    assert "needs ComfyUI 0.3.77 or newer" in caplog.text
