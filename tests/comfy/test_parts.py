"""What nodes make of their inputs and of the files they are given, without a merge."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kit import node, part, use_folders
from safetensors.torch import save_file

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, for which pytest brings it
    import tomli as tomllib


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": "sks cat, zwx dog"}, ("", "", ("sks cat", "zwx dog"))),
        ({"ss_dataset_dirs": json.dumps({"10_sks dog": {"n_repeats": 10}})}, ("sks", "dog", ())),
        ({"ss_dataset_dirs": json.dumps({"img": {}}), "ss_tag_frequency": "{}"}, ("", "", ())),
        ({"ss_tag_frequency": json.dumps({"a": {"red hair": 3, "xyz": 9}})}, ("xyz", "", ())),
        ({"ss_tag_frequency": "not JSON"}, ("", "", ())),
        ({"ss_tag_frequency": json.dumps({"a": {"xyz": None}})}, ("", "", ())),
        ({"ss_tag_frequency": json.dumps({"a": {"1girl": 9, "solo": 9}})}, ("", "", ())),
        ({}, ("", "", ())),
    ],
)
def test_words_of_a_file(
    pack: ModuleType, tmp_path: Path, metadata: dict[str, str], words: tuple[Any, ...]
) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "lora.safetensors", metadata)
    specs = part(pack, "nodes.concept_specs")
    spec = specs.make_spec(tmp_path / "lora.safetensors")
    assert (spec.trigger, spec.class_word, spec.subjects) == words
    core = part(pack, "iteris_core")
    reader = type("Reader", (), {"read_lora": lambda *_: core.Lora({})})()
    phrases = list(words[2]) or [w for w in [f"{words[0]} {words[1]}".strip()] if w]
    read = part(pack, "iteris_core.reading").read_concept
    assert list(read(spec, reader).phrases) == phrases


def test_what_comfyui_reads_of_the_project_file(library: None) -> None:
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


def test_a_concept(pack: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding is called by its path; a graph without strength_clip has one strength."""
    use_folders(monkeypatch, tmp_path, "loras")
    save_file({"a": torch.ones(1)}, tmp_path / "loras" / "a.safetensors")

    def spec(trigger: str = "sks", embedding: str = "none", **given: float) -> Any:
        values = {"trigger": trigger, "class_word": "cat", "prompts": "", "embedding": embedding}
        run = node(pack, "concept_nodes", "IterisConcept").execute
        return run("a.safetensors", strength=0.7, weight=1.0, **values, **given).result[0][0]

    called = spec("", "cats/sks.v2.safetensors")
    assert (called.trigger, called.class_word) == ("embedding:cats/sks.v2", "cat")
    assert (spec().strength, spec().text_strength) == (0.7, None)
    assert spec(strength_clip=0.0).text_strength == 0.0
    assert spec(strength_clip=-1.0).text_strength == -1.0


# -- settings -------------------------------------------------------------------------------------


def test_inputs_go_over_a_preset_where_they_are_changed(pack: ModuleType) -> None:
    inputs, core = part(pack, "nodes.merge_settings"), part(pack, "iteris_core")
    shown = {i.id: i for i in inputs._all_inputs()}
    usual = {name: i.default for name, i in shown.items()}
    declared = set(core.settings.declared_settings(core.IterisSettings))
    assert declared - set(shown) == {"micro_batch", "block_rate", "bound"}

    def settings(method: str = "iteris", preset: str = "default", **values: Any) -> dict[str, Any]:
        config = inputs.Request(preset, values={**usual, **values}).config((), method)
        resolved = core.merge.settings_over(
            config.preset, method, config.settings, config.calibration
        )
        own = core.methods.find_method(method).settings()
        return {n: v for n, v in vars(resolved[0]).items() if v != getattr(own, n)}

    def samples(*given: Any) -> Any:
        config = inputs.Request(*given, values=usual).config((), "iteris")
        return core.merge.settings_over(config.preset, "iteris", {}, config.calibration)[1].samples

    assert settings() == {}
    assert settings(rank=4, ridge=0.1) == {"rank": 4, "ridge": 0.1}
    assert settings(saliency=0.0) == {"saliency": 0.0}  # none is -1 there
    paper = settings(preset="paper", ridge=1e-3)
    assert (paper["objective"], paper["schedule"]) == ("adapter", "jacobi")
    assert (paper["repair"], paper["saliency"], paper["ridge"]) == (False, 0.0, 1e-3)
    assert settings(preset="best")["block_steps"] == 120
    assert settings(preset="best", block_steps=30)["block_steps"] == 30
    assert [samples("fast", n) for n in (0, 30, 50)] == [12, 30, 50]  # 0 is the preset's


def test_the_settings_of_other_methods(pack: ModuleType) -> None:
    def settings(method: str, **values: Any) -> dict[str, Any]:
        request = part(pack, "nodes.merge_settings").Request(preset="paper", values=values)
        return request.config((), method).settings

    found = settings("ties", rank=4, density=0.3, scale=0.0, ridge=0.1)
    assert found == {"rank": 4, "density": 0.3}
    assert settings("sum", rank=0, density=0.3, scale=0.7) == {}
    assert settings("task-arithmetic", scale=0.7) == {"scale": 0.7}
    assert settings("iteris", pull="size")["pull"] == "size"
    assert "pull" not in settings("iteris", pull="auto")


def test_the_plan_stays_on_the_node(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    # Of later versions, which leave out what comes within it.
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    runtime, progress = part(pack, "nodes.comfy_runtime"), part(pack, "iteris_core.progress")
    shown: list[str] = []
    monkeypatch.setattr(runtime, "show_text", lambda text, _: shown.append(text))
    show, plan = runtime.NodeProgress(None), "denoiser: 2 sites, 1 of 2 rows"
    show(progress.Progress("denoising steps", 0, 9))
    show(progress.Progress(f"plan: {plan}", left=200.0, share=0.2, plan=plan))
    show(progress.Progress("solving sites", 3, 9, left=100.0, share=0.5))
    show(progress.Progress("solving sites", 4, 9, left=90.0, share=0.55))
    assert shown == [
        "Denoising steps 0 of 9",
        "Plan: denoiser: 2 sites, 1 of 2 rows\nAbout 3 min left",
        "Plan: denoiser: 2 sites, 1 of 2 rows\nSolving sites 3 of 9, about 2 min left",
    ], "one that follows at once is not worth a message"
