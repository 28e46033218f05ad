"""The nodes' texts about files and LoRAs, without a model."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kit import merge_on

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, for which pytest brings it
    import tomli as tomllib


def module(pack: ModuleType, name: str) -> Any:
    return importlib.import_module(f"{pack.__name__}.{name}")


def use_loras_of(models: Path, pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI in this process has models/loras where the tests put them."""
    import folder_paths

    folder = models / "models" / "loras"
    known = folder_paths.folder_names_and_paths["loras"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], known))
    folder_paths.filename_list_cache.pop("loras", None)


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
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "lora.safetensors", metadata)
    specs = module(pack, "nodes.concept_specs")
    spec = specs.make_spec(tmp_path / "lora.safetensors")
    assert (spec.trigger, spec.class_word, spec.subjects) == words
    core = module(pack, "iteris_core")
    reader = type("Reader", (), {"read_lora": lambda *_: core.Lora({})})()
    phrases = list(words[2]) or [w for w in [f"{words[0]} {words[1]}".strip()] if w]
    read = module(pack, "iteris_core.reading").read_concept
    assert list(read(spec, reader).phrases) == phrases


def test_what_comfyui_reads_of_the_project_file(library: None) -> None:
    from comfy_config.config_parser import extract_node_configuration

    root = Path(__file__).resolve().parents[2]
    found = extract_node_configuration(str(root))
    assert found.project.name == "iteris-lora"
    assert found.project.supported_comfyui_version == ">=0.3.77"
    assert found.project.supported_os == ["OS Independent"]
    assert found.tool_comfy.publisher_id
    assert found.tool_comfy.display_name
    tables = tomllib.loads((root / "pyproject.toml").read_text())
    for name in ("Icon", "Banner"):
        assert (root / tables["tool"]["comfy"][name]).is_file()
    asked = (root / "requirements.txt").read_text().splitlines()
    wanted = {*found.project.dependencies, *tables["project"]["optional-dependencies"]["score"]}
    assert {line for line in asked if not line.startswith("#")} <= wanted


def scales(pack: ModuleType, config: dict[str, Any], names: tuple[str, ...]) -> dict[str, float]:
    """alpha / 4 of every module of rank 4 that the metadata speak of."""
    alphas = module(pack, "iteris_core.lora_files.alphas")
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    configs = alphas.adapter_configs(Path("x"), metadata)
    read = {name: alphas.scale_of(Path("x"), configs, f"unet.blocks.{name}", name, 4)
            for name in names}  # fmt: skip
    return {name: scale for name, scale in read.items() if scale is not None}


def test_alphas_of_the_metadata(pack: ModuleType) -> None:
    config = {
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"mid_block.*to_q": 2},
        "text_encoder.lora_alpha": 4,
        "text_encoder.use_rslora": True,
    }
    names = ("transformer.down.to_q", "transformer.mid_block.0.to_q", "text_encoder.q_proj",
             "other.q_proj")  # fmt: skip
    assert scales(pack, config, names) == {
        "transformer.down.to_q": 2.0,
        "transformer.mid_block.0.to_q": 0.5,
        "text_encoder.q_proj": 2.0,
    }


def test_alphas_of_a_model_that_saved_itself(pack: ModuleType) -> None:
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"^mid_block.0.to_q": 2}}
    names = ("down_blocks.0.to_q", "mid_block.0.to_q")
    assert list(scales(pack, config, names).values()) == [2.0, 0.5]


def test_interference_is_0_and_1_at_the_ends(pack: ModuleType) -> None:
    core, inspection = module(pack, "iteris_core"), module(pack, "iteris_core.report.inspection")
    rows = torch.linalg.qr(torch.randn(8, 8)).Q

    def lora(name: str, down: torch.Tensor) -> Any:
        change = core.LowRank(torch.randn(5, len(down)), down)
        return core.Lora({"unet.mid_block.to_q": change}, name)

    def overlap(one: Any, other: Any) -> float:
        return inspection.interference(one, other).blocks["mid_block"][0]

    a = lora("a", rows[:2])
    assert overlap(a, lora("b", rows[2:5])) == pytest.approx(0, abs=1e-9)
    assert overlap(a, lora("b", rows[:2] * 3)) == pytest.approx(1)


@pytest.mark.parametrize("ordered", [True, False])
def test_a_file_at_a_smaller_rank(pack: ModuleType, ordered: bool) -> None:
    """Ordered components are kept from the first on; others are cut by an SVD."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(6, 4, generator=generator), torch.randn(4, 5, generator=generator)
    conv_up, conv_down = torch.randn(6, 4, 1, 1), torch.randn(4, 5, 3, 3)
    tensors = {
        "lora_unet_a.lora_up.weight": up,
        "lora_unet_a.lora_down.weight": down,
        "lora_unet_a.alpha": torch.tensor(4.0),
        "lora_unet_b.lora_up.weight": conv_up,
        "lora_unet_b.lora_down.weight": conv_down,
        "lora_unet_c.lora_up.weight": up[:, :1],
        "lora_unet_c.lora_down.weight": down[:1],
    }
    found = module(pack, "nodes.save_node").cut_tensors(tensors, {}, 2, ordered=ordered)[0]
    assert float(found["lora_unet_a.alpha"]) == 2.0  # still alpha / rank = 1
    assert found["lora_unet_b.lora_up.weight"].shape == (6, 2, 1, 1)
    assert found["lora_unet_b.lora_down.weight"].shape == (2, 5, 3, 3)
    assert found["lora_unet_c.lora_up.weight"] is tensors["lora_unet_c.lora_up.weight"]
    product = found["lora_unet_a.lora_up.weight"] @ found["lora_unet_a.lora_down.weight"]
    if ordered:
        wanted = up[:, :2] @ down[:2]
    else:
        u, s, vt = torch.linalg.svd(up @ down)
        wanted = u[:, :2] @ torch.diag(s[:2]) @ vt[:2]
    assert torch.allclose(product, wanted, atol=1e-5)


def test_the_metadata_of_a_smaller_rank(pack: ModuleType) -> None:
    tensors = {"a.lora_up.weight": torch.ones(3, 2)}
    names = module(pack, "nodes.save_node")
    metadata = {"modelspec.hash_sha256": "0xold", "ss_network_dim": "16", "iteris": "{}"}
    metadata["iteris"] = '{"method": "iteris"}'
    _, found = names.cut_tensors(tensors, metadata, 2, ordered=True)
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "2"
    cut = {"rank": 2, "ordered": True}
    assert json.loads(found["iteris"]) == {"method": "iteris", "cut": cut}
    assert found["modelspec.hash_sha256"] == "0x" + names.content_hash(tensors)
    assert "modelspec.hash_sha256" not in names.cut_tensors(tensors, {}, 2, ordered=True)[1]


def test_names_of_saved_files(
    pack: ModuleType, library: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path / "loras")])
    save = module(pack, "nodes.save_node").SaveMergedLora
    monkeypatch.setattr(save, "hidden", type("Hidden", (), {"unique_id": None}), raising=False)
    lora = {"lora_unet_a.lora_up.weight": torch.ones(3, 2)}
    prefixes = ("one", "folder/one", "one", "one.safetensors", "v1.5/two")
    names = [save.execute(lora, prefix).result[0] for prefix in prefixes]
    assert names == ["one.safetensors", "folder/one.safetensors", "one_2.safetensors",
                     "one_3.safetensors", "v1.5/two.safetensors"]  # fmt: skip
    assert save.execute(lora, "one", overwrite=True).result == ("one.safetensors",)
    before = sorted(tmp_path.rglob("*"))
    for prefix, message in {
        "": "no name",
        " ": "no name",
        ".": "no name",
        "folder/": "no name",
        "folder/..": "no name",
        "..": "outside the folder",
        "../other": "outside the folder",
        "/tmp/other": "outside the folder",
        "folder/../../other": "outside the folder",
    }.items():
        with pytest.raises(module(pack, "iteris_core").IterisError, match=message):
            save.execute(lora, prefix)
    with pytest.raises(module(pack, "iteris_core").IterisError, match="no folder elsewhere"):
        save.execute(lora, "one", folder="elsewhere")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_embedding_is_named_by_its_path(
    pack: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = module(pack, "nodes.concept_nodes")
    use_loras_of(models, pack, monkeypatch)
    (specs,) = nodes.IterisConcept.execute(
        "a.safetensors", "", "", 1.0, 1.0, "", "cats/sks.v2.safetensors"
    ).result
    assert (specs[0].trigger, specs[0].class_word) == ("embedding:cats/sks.v2", "cat")


def test_the_strength_in_clip_of_a_concept(
    pack: ModuleType, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = module(pack, "nodes.concept_nodes")
    use_loras_of(models, pack, monkeypatch)

    def clip_strength(**given: float) -> float | None:
        values = {"trigger": "sks", "class_word": "cat", "prompts": "", "embedding": "none"}
        (specs,) = nodes.IterisConcept.execute(
            "a.safetensors", strength=0.7, weight=1.0, **values, **given
        ).result
        assert specs[0].strength == 0.7
        return specs[0].text_strength

    assert clip_strength() is None  # a graph without it: the same as strength
    assert clip_strength(strength_clip=0.0) == 0.0
    assert clip_strength(strength_clip=-1.0) == -1.0


def test_inputs_are_what_the_settings_declare(pack: ModuleType) -> None:
    inputs, core = module(pack, "nodes.schema"), module(pack, "iteris_core")
    shown = inputs.setting_input(core.IterisSettings, "ridge").as_dict()
    assert (shown["default"], shown["min"], shown["max"], shown["step"]) == (0.0, 0.0, 0.5, 1e-7)
    assert "0: set by the number of prompts" in shown["tooltip"]
    shown = inputs.setting_input(core.IterisSettings, "weighting")
    assert shown.options == ["tokens", "adapter", "full", "none"]
    assert inputs.setting_input(core.IterisSettings, "repair").default is True
    shown = inputs.setting_input(core.IterisSettings, "saliency").as_dict()
    assert (shown["default"], shown["min"], shown["max"]) == (-1.0, -1.0, 1.0)
    assert "-1: 1 - 2 / LoRAs" in shown["tooltip"]
    shown = inputs.setting_input(core.Calibration, "timesteps").as_dict()
    assert (shown["default"], shown["min"], shown["max"]) == (0, 0, 10)
    assert "the same result" not in inputs.setting_input(core.IterisSettings, "schedule").tooltip


def test_inputs_go_over_a_preset_where_they_are_changed(pack: ModuleType) -> None:
    request = module(pack, "nodes.merge_settings").Request
    core = module(pack, "iteris_core")
    usual = {i.id: i.default for i in module(pack, "nodes.merge_settings")._all_inputs()}

    def settings(method: str = "iteris", preset: str = "default", **values: Any) -> dict[str, Any]:
        config = request(preset, values={**usual, **values}).config((), method)
        resolved = core.merge.settings_over(
            config.preset, method, config.settings, config.calibration
        )
        own = core.methods.find_method(method).settings()
        return {n: v for n, v in vars(resolved[0]).items() if v != getattr(own, n)}

    def calibration(*given: Any) -> Any:
        config = request(*given, values=usual).config((), "iteris")
        return core.merge.settings_over(config.preset, "iteris", {}, config.calibration)[1]

    assert settings() == {}
    assert settings(rank=4, ridge=0.1) == {"rank": 4, "ridge": 0.1}
    assert settings(saliency=0.0) == {"saliency": 0.0}  # none is -1 there
    paper = settings(preset="paper", ridge=1e-3)
    assert (paper["objective"], paper["weighting"], paper["schedule"]) == (
        "adapter", "adapter", "jacobi",
    )  # fmt: skip
    assert (paper["repair"], paper["saliency"], paper["ridge"]) == (False, 0.0, 1e-3)
    assert settings(preset="best")["block_steps"] == 120
    assert settings(preset="best", block_steps=30)["block_steps"] == 30
    assert not request("best").note
    assert calibration().latent_size is None
    assert calibration("fast").samples == 12
    assert calibration("fast", 30).samples == 30
    assert calibration("fast", 50).samples == 50  # and 0 is the preset's
    assert calibration("best", 0).samples == 100


def test_the_settings_of_other_methods(pack: ModuleType) -> None:
    request = module(pack, "nodes.merge_settings").Request
    core = module(pack, "iteris_core")

    def settings(method: str, **values: Any) -> dict[str, Any]:
        return request(preset="paper", values=values).config((), method).settings

    assert settings("ties", rank=4, density=0.3, scale=0.0, ridge=0.1) == {
        "rank": 4,
        "density": 0.3,
    }
    assert settings("sum", rank=0, density=0.3, scale=0.7) == {}
    assert settings("task-arithmetic", scale=0.7) == {"scale": 0.7}
    shown = {i.id: i.tooltip for i in module(pack, "nodes.merge_settings")._all_inputs()}
    assert "0: the method's default (ties 0.2, dare-linear 0.5" in shown["density"]
    assert settings("iteris", pull="size")["pull"] == "size"
    assert "pull" not in settings("iteris", pull="auto")
    declared = set(core.settings.declared_settings(core.IterisSettings))
    not_here = {"micro_batch", "block_rate", "bound"}
    assert declared - set(shown) == not_here


def test_no_path_of_this_machine_is_written(
    kit: Any, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import folder_paths

    loras = models / "models" / "loras"
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(loras)])
    (loras / "cats").mkdir(exist_ok=True)
    inner = loras / "cats" / "inner.safetensors"
    inner.write_bytes((loras / "a.safetensors").read_bytes())
    outer = models / "outer.safetensors"
    outer.write_bytes((loras / "b.safetensors").read_bytes())
    concepts = [kit.specs.make_spec(file, trigger="sks") for file in (inner, outer)]
    result = merge_on(kit.merging, kit.model, kit.clip, concepts, "sum", {}, kit.calibration)
    lora = kit.merging.as_lora_model(result)
    recorded = [c["file"] for c in json.loads(lora.metadata["iteris"])["concepts"]]
    assert recorded == ["cats/inner.safetensors", "outer.safetensors"]
    save = module_of(kit, "nodes.save_node").SaveMergedLora
    monkeypatch.setattr(save, "hidden", type("Hidden", (), {"unique_id": None}), raising=False)
    (name,) = save.execute(lora, "whole").result
    assert str(models).encode() not in (loras / name).read_bytes()


def module_of(kit: Any, name: str) -> Any:
    return importlib.import_module(f"{kit.core.__name__.rpartition('.')[0]}.{name}")


def test_an_embedding_beside_a_lora_has_to_be_called_for(
    kit: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "toy.safetensors"
    file.write_bytes((models / "models" / "loras" / "a.safetensors").read_bytes())
    vector = torch.ones(1, 768)
    save_file({"clip_l": vector}, tmp_path / "toy_emb.safetensors")
    save_file({"emb_params": vector}, tmp_path / "word.safetensors")
    monkeypatch.setattr(kit.clip.tokenizer.clip_l, "embedding_directory", [str(tmp_path)])
    calibration = kit.core.Calibration(samples=2, timesteps=1, latents="noise", latent_size=8)

    def summary(trigger: str) -> str:
        spec = kit.specs.make_spec(file, trigger=trigger, class_word="cat")
        result = merge_on(kit.merging, kit.model, kit.clip, [spec], "iteris", {}, calibration)
        return result.report.summary()

    assert "'sks' calls for its embedding toy" in summary("sks")
    assert "toy is NOT IN FORCE" in summary("embedding:nowhere")
    assert "NOT IN FORCE" not in summary("embedding:word")


def test_the_plan_stays_on_the_node(pack: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.utils

    # Of later versions, which leave out what comes within it.
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    runtime = module(pack, "nodes.comfy_runtime")
    shown: list[str] = []
    monkeypatch.setattr(runtime, "show_text", lambda text, _: shown.append(text))
    progress_of = module(pack, "iteris_core.progress").Progress
    show = runtime.NodeProgress(None)
    moved: list[int] = []
    show._bar.hook = lambda value, *_, **__: moved.append(value)
    show(progress_of("denoising steps", 0, 9))
    plan = "denoiser: 2 sites, 1 of 2 rows"
    show(progress_of(f"plan: {plan}", left=200.0, share=0.2, plan=plan))
    show(progress_of("solving sites", 3, 9, left=100.0, share=0.5))
    show(progress_of("solving sites", 4, 9, left=90.0, share=0.55))
    assert shown == [
        "Denoising steps 0 of 9",
        "Plan: denoiser: 2 sites, 1 of 2 rows\nAbout 3 min left",
        "Plan: denoiser: 2 sites, 1 of 2 rows\nSolving sites 3 of 9, about 2 min left",
    ], "one that follows at once is not worth a message"
    assert moved == [0, 200, 500, 550], "one bar for the whole merge"
