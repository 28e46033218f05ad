"""peft adapters as saved by diffusers, with everything that a LoraConfig can contain."""

import copy
import json
from pathlib import Path

import pytest
import torch
from bases import KINDS, outputs, tiny
from test_lora_layouts import furthest, with_changes

from iteris_core import LoraFileError
from iteris_core.hosts.diffusers_lora import pipeline_sites, read_lora
from iteris_core.lora_files import ReadOptions
from iteris_core.lora_files.factors import configured_scale

TARGETS = ["to_q", "to_k", "to_out.0", "net.2", "proj_out"]
CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6},
    "rsLoRA": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"to_k": 2, r"blocks.\d+.ff.net.2": 3},
        "alpha_pattern": {"to_k": 1, ".*0.*to_out.0": 5, "^proj_out": 2},
    },
    "patterns of rsLoRA": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"to_k": 2},
        "alpha_pattern": {"to_k": 1, "to_q": 12},
    },
    "DoRA": {"r": 4, "lora_alpha": 2, "use_dora": True},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module")
@pytest.mark.parametrize(
    ("kind", "name"), [*(("sd1", name) for name in CONFIGS), *((k, "patterns") for k in KINDS[1:])]
)
def test_what_diffusers_saves_is_read_as_it_runs(kind, name, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    pipeline = copy.deepcopy(tiny(kind))
    denoiser = "transformer" if hasattr(pipeline, "transformer") else "unet"
    generator = torch.Generator().manual_seed(0)
    saved = {}
    targets = {denoiser: TARGETS, "text_encoder": ["q_proj", "out_proj", "fc2"]}
    for component, modules in targets.items():
        model = getattr(pipeline, component)
        config = LoraConfig(**CONFIGS[name], target_modules=modules)
        inject_adapter_in_model(config, model)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
            elif "magnitude" in parameter_name:
                parameter.data *= 1 + torch.rand(parameter.shape, generator=generator)
        saved[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{component}_lora_adapter_metadata"] = config.to_dict()
    pipeline.save_lora_weights(tmp_path, **saved)
    lora = read_lora(
        tiny(kind), pipeline_sites(tiny(kind)), tmp_path / "pytorch_lora_weights.safetensors",
        ReadOptions(energy=1.0),
    )  # fmt: skip
    theirs = outputs(kind, pipeline)
    assert furthest(outputs(kind, with_changes(kind, lora)), theirs) < 1e-5
    assert furthest(theirs, outputs(kind, tiny(kind))) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_model_of_diffusers_saves_by_itself(kind, tmp_path):
    """Neither the keys nor the config name a component then."""
    from peft import LoraConfig

    pipeline = copy.deepcopy(tiny(kind))
    model = getattr(pipeline, "transformer", None) or pipeline.unet
    pattern = {"to_k": 12}
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, alpha_pattern=pattern))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    model.save_lora_adapter(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    lora = read_lora(tiny(kind), pipeline_sites(tiny(kind)), path)
    assert furthest(outputs(kind, with_changes(kind, lora)), outputs(kind, pipeline)) < 1e-5


LAYER = "text_model.encoder.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("module", [LAYER, LAYER.removeprefix("text_model.")])
@pytest.mark.parametrize("pattern", [
    LAYER, LAYER.removeprefix("text_model."), "^" + LAYER, "^" + LAYER.removeprefix("text_model."),
    "q_proj", r"layers.\d+.self_attn.q_proj",
])  # fmt: skip
def test_patterns_fit_whatever_transformers_called_the_module(module, pattern):
    config = {"lora_alpha": 8, "alpha_pattern": {"v_proj": 1, pattern: 2}}
    assert configured_scale(Path("a"), config, [module], 4) == 0.5
    assert configured_scale(Path("a"), config, [module.replace("q_proj", "k_proj")], 4) == 2
    assert configured_scale(Path("a"), config, [module.replace("q_proj", "v_proj")], 4) == 0.25


@pytest.mark.parametrize(("config", "message"), [
    ({"lora_alpha": "much"}, "not a number"),
    ({"lora_alpha": float("inf")}, "inf"),
    ({"lora_alpha": 1, "alpha_pattern": [1]}, "not a table"),
    ({"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}, "too complicated"),
    ({"lora_alpha": 1, "alpha_pattern": {"[": 2}}, "unterminated"),
])  # fmt: skip
def test_what_no_config_of_peft_says_is_an_error(config, message):
    with pytest.raises(LoraFileError, match=message):
        configured_scale(Path("a"), json.loads(json.dumps(config)), [LAYER], 4)
