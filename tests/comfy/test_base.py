"""The base of a merge is what MODEL and CLIP draw with, whatever other nodes have done to them; and
it stays as it is, whatever happens."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kit import Kit, distance, part
from reduced_models.unets import sd15
from torch import nn


@pytest.mark.parametrize("after", [1, 20, 60])
@pytest.mark.parametrize("error", ["ValueError", "interrupt"])
def test_a_merge_that_stops_leaves_the_base_as_it_was(kit, monkeypatch, error, after):
    """ComfyUI's own question whether a run is cancelled is what stops it, while samples are made
    and while sites are solved."""
    import comfy.model_management as memory

    before, asked = kit.outputs(), list[int]()
    stops = ValueError("broken") if error == "ValueError" else memory.InterruptProcessingException()

    def stop():
        asked.append(1)
        if len(asked) > after:
            raise stops

    with monkeypatch.context() as patched:
        patched.setattr(memory, "throw_exception_if_processing_interrupted", stop)
        with pytest.raises(type(stops)):
            kit.merge()
    assert kit.unchanged(before)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_what_to_lower_is_said_where_nothing_fits(kit):
    before = kit.outputs()
    with pytest.raises(kit.core.IterisError, match="lower samples, timesteps or image_size"):
        kit.merge(memory_budget=1000)
    assert kit.unchanged(before)


# -- what other nodes have done to them -----------------------------------------------------------


def hooked(kit, strength, keyframes=None):
    """The CLIP with a LoRA as a hook, for itself and for the MODEL it is used with."""
    import comfy.hooks
    import comfy.utils
    from comfy_extras.nodes_hooks import SetClipHooks

    weights = comfy.utils.load_torch_file(str(kit.loras / "c.safetensors"))
    hooks = comfy.hooks.create_hook_lora(weights, strength, strength)
    if keyframes is not None:
        hooks.set_keyframes_on_hooks(keyframes)
    with torch.inference_mode():
        return SetClipHooks().apply_hooks(kit.clip, False, True, hooks)[0]


def with_weights_of(parts):
    """A fresh MODEL and CLIP with the weights of ``parts`` and of their patches, in float32."""
    import comfy.model_management as memory

    model, clip = parts
    fresh = sd15()
    with torch.inference_mode():
        memory.load_models_gpu([model, clip.patcher], force_full_load=True)
        state = {key: value.float() for key, value in model.model.state_dict().items()}
        fresh[0].model.load_state_dict(state)
        fresh[1].cond_stage_model.load_state_dict(clip.cond_stage_model.state_dict())
    return fresh


def quantised(kit, form, groups=1, **how):
    """Linear layers of ComfyUI's mixed precision, of comfy-kitchen's eager operations; those of
    widths that are no multiple of ``groups`` are left as they are."""
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    base = sd15()
    network = base[0].model.diffusion_model
    with torch.inference_mode():
        for name, plain in [*network.named_modules()]:
            if not isinstance(plain, nn.Linear) or plain.in_features % groups:
                continue
            layer = ops.Linear(plain.in_features, plain.out_features, plain.bias is not None)
            layer.quant_format, layer.layout_type = form, layout
            weight = QuantizedTensor.from_float(plain.weight.detach().float(), layout, **how)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            if plain.bias is not None:
                layer.bias = nn.Parameter(plain.bias.detach().float(), requires_grad=False)
            layer.weight_function, layer.bias_function = [], []
            parent, _, last = name.rpartition(".")
            setattr(network.get_submodule(parent), last, layer)
    return base


def dequantised(base):
    fresh = sd15()
    layers = dict(base[0].model.diffusion_model.named_modules())
    with torch.inference_mode():
        for name, plain in fresh[0].model.diffusion_model.named_modules():
            if isinstance(plain, nn.Linear) and not isinstance(layers[name], nn.Linear):
                plain.weight.copy_(layers[name].weight.dequantize().float())
    return fresh


def fp8(kit):
    eight, _ = sd15(dtype=torch.float8_e4m3fn)
    assert eight.model_dtype() == torch.float8_e4m3fn
    return eight, kit.clip


BASES: dict[str, tuple[Callable[[Kit], Any], Callable[[Kit, Any], Any], float]] = {
    "a LoRA": (
        lambda kit: kit.stock("c.safetensors", 0.5),
        lambda _, on: with_weights_of(on),
        1e-4,
    ),
    "a LoRA as a hook": (
        lambda kit: (kit.model, hooked(kit, 0.5)),
        lambda kit, _: kit.stock("c.safetensors", 0.5),
        1e-4,
    ),
    "fp8": (fp8, lambda _, on: with_weights_of(on), 1e-4),
    "float8 layers": (
        lambda kit: quantised(kit, "float8_e4m3fn"),
        lambda _, on: dequantised(on),
        1e-3,
    ),
    "nvfp4 layers": (lambda kit: quantised(kit, "nvfp4"), lambda _, on: dequantised(on), 1e-3),
}
"""What there is, the same in another form, and how near merges on the two are."""


@pytest.mark.parametrize("name", BASES)
def test_a_merge_is_on_what_the_base_draws_with(kit, name):
    make, same, near = BASES[name]
    kit.calibration = dataclasses.replace(kit.calibration, latents="noise")
    on = make(kit)
    nothing = part(kit.pack, "nodes.comfy_conds").References()
    hashed = partial(part(kit.pack, "nodes.comfy_digest").digest_of_base, references=nothing)
    assert (hashed([on[0]], on[1]) is None) == ("hook" in name)
    assert hashed([on[0]], on[1]) != hashed([kit.model], kit.clip)
    found = kit.merge(on=on).lora
    assert distance(found, kit.merge(on=same(kit, on)).lora) < near
    assert distance(found, kit.merge().lora) > 10 * near
    assert not kit.model.hook_patches
    assert not kit.model.hook_backup


def test_a_model_that_is_half_in_host_memory(kit, monkeypatch):
    """With a LoRA on it that is applied as weights are cast."""
    import comfy.model_management as memory

    patched = kit.stock("c.safetensors", 0.5)
    plain, whole = kit.merge().lora, kit.merge(on=patched).lora
    with torch.inference_mode():
        memory.load_models_gpu([patched[0], patched[1].patcher])
        patched[0].partially_unload(patched[0].offload_device, patched[0].model_size() // 2)
    assert any(getattr(m, "weight_function", None) for m in patched[0].model.modules())
    monkeypatch.setattr(memory, "load_models_gpu", lambda *_, **__: None)
    assert distance(kit.merge(on=patched).lora, whole) < 0.05 < distance(whole, plain)


def test_patches_and_wrappers_of_other_nodes_run(kit):
    """A patch of attention's inputs and a wrapper of the whole UNet, which may look the step up."""
    plain, model, steps = kit.merge().lora, kit.model.clone(), set[int]()

    def halve(q, k, v, extra):
        known = extra["sample_sigmas"]
        steps.update(int((known == sigma).sum()) for sigma in extra["sigmas"])
        return q * 0.5, k, v

    model.set_model_attn2_patch(halve)
    model.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * 0.9
    )
    assert distance(kit.merge(on=(model, kit.clip)).lora, plain) > 1e-2
    assert steps == {1}
    assert distance(kit.merge().lora, plain) == 0


def test_compiled_models_run_uncompiled(kit):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def fail(*_):
        raise AssertionError("compiled")

    model = kit.model.clone()
    set_torch_compile_wrapper(model=model, backend=fail)
    wrappers = str(model.wrappers)
    assert distance(kit.merge(on=(model, kit.clip)).lora, kit.merge().lora) == 0
    assert str(model.wrappers) == wrappers


def test_another_sampling_makes_latents_again(kit):
    """Kept latents are of one MODEL and CLIP, not of all that share their weights."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    plain = kit.merge().lora
    (model,) = ModelSamplingDiscrete().patch(kit.model, "v_prediction", False)
    assert distance(kit.merge(on=(model, kit.clip)).lora, plain) > 1e-3
    assert distance(kit.merge().lora, plain) == 0


def test_what_cannot_be_a_base_is_refused_in_one_sentence(kit, monkeypatch):
    import comfy.hooks

    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.5, start_percent=0.3))
    with pytest.raises(kit.core.IterisError, match="hook schedule"):
        kit.merge(on=(kit.model, hooked(kit, 0.5, keyframes)))
    with pytest.raises(kit.core.IterisError, match="no CLIP is connected"):
        kit.merge(on=(kit.model, None))
    clip = hooked(kit, 0.5)
    clip.apply_hooks_to_conds = clip.patcher.forced_hooks
    with monkeypatch.context() as patched:
        patched.setattr(type(kit.model), "is_dynamic", lambda self: True, raising=False)
        with pytest.raises(kit.core.IterisError, match=r"has hooks for MODEL.*DynamicVRAM"):
            kit.merge(on=(kit.model, clip))
    kind = type("SVDQW4A4Linear", (nn.Module,), {"__module__": "nunchaku.models.linear"})
    kit.model.model.diffusion_model.extra = kind()
    with pytest.raises(kit.core.IterisError, match="MODEL is a Nunchaku model"):
        kit.merge()
