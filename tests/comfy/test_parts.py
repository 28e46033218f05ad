"""What nodes make of their inputs and of the files they are given, without a merge."""

from pathlib import Path

import torch
from kit import node, part, use_folders
from safetensors.torch import save_file

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, for which pytest brings it
    import tomli as tomllib


def test_what_comfyui_reads_of_the_project_file(library):
    from comfy_config.config_parser import extract_node_configuration

    root = Path(__file__).resolve().parents[2]
    found = extract_node_configuration(str(root))
    assert found.project.name == "iteris-lora"
    assert found.project.supported_comfyui_version == ">=0.3.77"
    assert found.tool_comfy.publisher_id
    assert found.tool_comfy.display_name
    tables = tomllib.loads((root / "pyproject.toml").read_text())
    for name in ("Icon", "Banner"):
        assert (root / tables["tool"]["comfy"][name]).is_file()
    asked = (root / "requirements.txt").read_text().splitlines()
    wanted = {*found.project.dependencies, *tables["project"]["optional-dependencies"]["score"]}
    assert {line for line in asked if not line.startswith("#")} <= wanted


def test_a_concept(pack, tmp_path, monkeypatch):
    """An embedding is called by its path; a graph without strength_clip has one strength."""
    use_folders(monkeypatch, tmp_path, "loras")
    save_file({"a": torch.ones(1)}, tmp_path / "loras" / "a.safetensors")

    def spec(trigger="sks", embedding="none", **given):
        values = {"trigger": trigger, "class_word": "cat", "prompts": "", "embedding": embedding}
        run = node(pack, "concept_nodes", "IterisConcept").execute
        return run("a.safetensors", strength=0.7, weight=1.0, **values, **given).result[0][0]

    called = spec("", "cats/sks.v2.safetensors")
    assert (called.trigger, called.class_word) == ("embedding:cats/sks.v2", "cat")
    assert (spec().strength, spec().text_strength) == (0.7, None)
    assert spec(strength_clip=0.0).text_strength == 0.0
    assert spec(strength_clip=-1.0).text_strength == -1.0


# -- settings -------------------------------------------------------------------------------------


def test_inputs_go_over_a_preset_where_they_are_changed(pack):
    inputs, core = part(pack, "nodes.merge_settings"), part(pack, "iteris_core")
    shown = {i.id: i for i in inputs.IterisMergeSettings.define_schema().inputs}
    usual = {name: i.default for name, i in shown.items()}
    declared = set(core.settings.declared_settings(core.IterisSettings))
    assert declared - set(shown) == {"micro_batch", "bound"}

    def settings(method="iteris", preset="default", **values):
        config = inputs.Request(preset, values={**usual, **values}).config((), method)
        resolved = core.methods.registry.settings_over(
            config.preset, method, config.settings, config.calibration
        )
        own = core.methods.find_method(method).settings()
        return {n: v for n, v in vars(resolved[0]).items() if v != getattr(own, n)}

    def samples(*given):
        config = inputs.Request(*given, values=usual).config((), "iteris")
        over = core.methods.registry.settings_over
        return over(config.preset, "iteris", {}, config.calibration)[1].samples

    assert settings() == {}
    assert settings(rank=4, ridge=0.1) == {"rank": 4, "ridge": 0.1}
    assert settings(saliency=0.0) == {"saliency": 0.0}  # none is -1 there
    paper = settings(preset="paper", ridge=1e-3)
    assert (paper["objective"], paper["schedule"]) == ("adapter", "jacobi")
    assert (paper["repair"], paper["saliency"], paper["ridge"]) == (False, 0.0, 1e-3)
    assert settings(preset="best")["steps"] == 200
    assert settings(preset="best", steps=30)["steps"] == 30
    assert [samples("fast", n) for n in (0, 30, 50)] == [32, 30, 50]  # 0 is the preset's


def test_the_settings_of_other_methods(pack):
    def settings(method, **values):
        request = part(pack, "nodes.merge_settings").Request(preset="paper", values=values)
        return request.config((), method).settings

    assert settings("ties", rank=4, ridge=0.1) == {"rank": 4}
    assert settings("sum", rank=0, ridge=0.1) == {}
