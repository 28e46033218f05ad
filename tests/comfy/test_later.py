"""What ComfyUI changed from 0.34 to 0.46: by the same code in 0.33 where it is there, elsewhere by
stubs that do what the change does. docs/comfyui.md has a table of them."""

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
from figures import Trial
from kit import distance
from reduced_models import ARCHITECTURES, write_lora
from test_base import dequantised, quantised
from torch import nn


def test_a_layer_whose_weight_is_read_past_its_call_is_refused(kit, monkeypatch):
    """Tomorrow's fused operation that no switch turns off."""
    import comfy.ldm.modules.attention as attention

    def fused(self, x):
        last = self.net[2]
        return nn.functional.linear(self.net[0](x), last.weight, last.bias)

    path = kit.loras / "whole.safetensors"
    layers = dict(kit.model.model.diffusion_model.named_modules())
    sites = {
        f"diffusion_model.{name}": (*layer.weight.shape,)
        for name, layer in layers.items()
        if ".ff.net." in name and isinstance(layer, nn.Linear)
    }
    write_lora(path, sites, 1)
    concept = kit.specs.make_spec(path, trigger="sks", class_word="cat")
    kit.merge(concepts=[concept], unmergeable="refuse")
    monkeypatch.setattr(attention.FeedForward, "forward", fused)
    with pytest.raises(kit.core.IterisError, match=r"ff\.net\.2 \(in whole.*is not used"):
        kit.merge(concepts=[concept], unmergeable="refuse")


@pytest.mark.parametrize("where", ["denoiser", "text encoder"])
def test_a_layer_that_scales_its_input_is_merged_on_what_its_weight_gets(kit, where):
    """``pre_quant_scale`` of AWQ: ComfyUI's LoRAs change the weight that gets x · s."""
    import comfy.ops

    roots = {"denoiser": kit.model.model.diffusion_model, "text encoder": kit.clip.cond_stage_model}
    ends = {"denoiser": "attn2.to_q", "text encoder": "0.self_attn.q_proj"}
    name, plain = next((n, m) for n, m in roots[where].named_modules() if n.endswith(ends[where]))
    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    with torch.inference_mode():
        layer = ops.Linear(plain.in_features, plain.out_features, plain.bias is not None)
        layer.weight, layer.bias = (
            None if w is None else nn.Parameter(w.detach().float(), requires_grad=False)
            for w in (plain.weight, plain.bias)
        )
        scale = torch.rand(plain.in_features) + 0.5
        layer.pre_quant_scale = nn.Parameter(scale, requires_grad=False)
    layer.weight_function, layer.bias_function = [], []
    if "pre_quant_scale" not in type(layer).forward.__code__.co_consts:
        pytest.skip("this ComfyUI has no pre_quant_scale")
    parent, _, last = name.rpartition(".")
    setattr(roots[where].get_submodule(parent), last, layer)
    given: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: given.append(args[0].clone()))
    layer.register_forward_hook(lambda _, args, __: seen.append(args[0].clone()))
    before = kit.outputs()
    assert all(torch.equal(*pair) for pair in zip(given, seen, strict=True))
    given.clear(), seen.clear()
    kit.merge()
    assert given
    assert all(torch.equal(x * scale, got) for x, got in zip(given, seen, strict=True))
    assert layer.pre_quant_scale is not None
    assert all(torch.equal(*pair) for pair in zip(kit.outputs(), before, strict=True))


@pytest.mark.parametrize("merged", [(), ("merged_qkv", "merged_mlp")], ids=["apart", "merged"])
def test_a_text_encoder_whose_blocks_write_into_their_input(pack, tmp_path, monkeypatch, merged):
    """Qwen's, with queries, keys and values in one layer, and so gate and up: the flags that 0.45
    sets are in 0.33."""
    import comfy.text_encoders.llama as llama

    if not hasattr(llama.Attention(llama.Qwen3_4BConfig(), ops=nn), "merged_qkv"):
        pytest.skip("this ComfyUI has no merged layers")
    for flag in merged:
        monkeypatch.setattr(llama.Qwen3_4BConfig, flag, True, raising=False)
    trial = Trial(pack, ARCHITECTURES["Z-Image"], tmp_path)
    assert any("qkv_proj" in name for name in trial.layers()) == bool(merged)
    written: list[bool] = []

    def look(_, args, kwargs, output):
        written.append(output[0].data_ptr() == kwargs["x"].data_ptr())

    encoder = trial.clip.cond_stage_model.qwen3_4b.transformer.model
    handle = encoder.layers[1].register_forward_hook(look, with_kwargs=True)
    assert trial.alone() < 1e-3
    handle.remove()
    assert any(written)
    rows, file = trial.rows_and_file()
    assert (rows < 5e-3, file < 1e-3) == (True, True)
    assert trial.unchanged()


def test_the_model_is_told_the_shapes_of_its_latents(kit, monkeypatch):
    """``CFGGuider.inner_sample`` sets ``latent_shapes``; a merge calls the denoiser without it, on
    a model that may have drawn a video with its sound before."""
    model = kit.model.model
    if not hasattr(model, "latent_shapes"):
        pytest.skip("this ComfyUI has no latent_shapes")
    model.latent_shapes = before = [(1, 4, 8, 8), (1, 2, 5)]
    seen: set[Any] = set()
    plain = {name: getattr(model, name) for name in ("process_latent_in", "extra_conds")}

    def looking(name, *args, **kwargs):
        seen.add((name, len(model.latent_shapes)))
        return plain[name](*args, **kwargs)

    for name in plain:
        monkeypatch.setattr(model, name, partial(looking, name))
    model.diffusion_model.register_forward_pre_hook(
        lambda *_: seen.add(("forward", len(model.latent_shapes)))
    )
    kit.calibration = dataclasses.replace(kit.calibration, latents="noise")
    kit.merge()
    assert seen == {("extra_conds", 1), ("forward", 1)}
    assert model.latent_shapes == before


def test_experts_in_one_tensor_are_refused(pack, tmp_path):
    """``MoEExperts``: a bank of (experts, out, in)."""
    trial = Trial(pack, ARCHITECTURES["Lens"], tmp_path)
    name = "text_encoders.gpt_oss.transformer.layers.0.mlp.experts.down_proj"
    path = write_lora(tmp_path / "experts.safetensors", {name: (64, 64)}, 1)
    spec = trial.specs.make_spec(path, trigger="sks")
    trial.concepts = lambda count: [spec]
    with pytest.raises(trial.core.IterisError, match=r"experts\.down_proj.*, not the weight"):
        trial.merge(1)


ROTATED = {"convrot_groupsize": 16}
CHANNELS = {"is_weight": True, "per_channel": True}
QUANTISED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8": ("int8_tensorwise", CHANNELS),
    "int8 with a rotation": ("int8_tensorwise", {**CHANNELS, "convrot": True, **ROTATED}),
    "w4a4": ("convrot_w4a4", {"groups": 64, **ROTATED}),
    "w4a8": ("asym_w4a8_int8", {"group_size": 16, **ROTATED}),
    "mxfp8": ("mxfp8", {}),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_merge_on_a_quantised_base(kit, name):
    """It is that on the weights that they stand for; their inputs are not rounded meanwhile."""
    form, how = QUANTISED[name]
    quant = pytest.importorskip("comfy.quant_ops")
    if form not in quant.QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {form}")
    kit.calibration = dataclasses.replace(kit.calibration, latents="noise")
    on = quantised(kit, form, **how)
    found = kit.merge(on=on).lora
    assert distance(found, kit.merge(on=dequantised(on)).lora) < 1e-3
    assert distance(found, kit.merge().lora) > 1e-3
    layers = [m for m in on[0].model.modules() if hasattr(m, "_full_precision_mm")]
    assert layers
    assert not any(m._full_precision_mm or "_forward" in m.__dict__ for m in layers)
