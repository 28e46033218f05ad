"""Other nodes' changes of MODEL and CLIP count as the base: hooks, wrappers, patches, another
sampling. Unsupported ones are refused in one sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kit import Kit, distance, merge_on


def hooked(kit: Kit, strength: float, keyframes: Any = None) -> Any:
    """The CLIP with a LoRA as a hook, for itself and for the MODEL it is used with."""
    import comfy.hooks
    import comfy.utils
    from comfy_extras.nodes_hooks import SetClipHooks

    weights = comfy.utils.load_torch_file(str(kit.loras / "a.safetensors"))
    hooks = comfy.hooks.create_hook_lora(weights, strength, strength)
    if keyframes is not None:
        hooks.set_keyframes_on_hooks(keyframes)
    (clip,) = SetClipHooks().apply_hooks(kit.clip, False, True, hooks)
    return clip


def patched(kit: Kit, strength: float) -> tuple[Any, Any]:
    import comfy.sd
    import comfy.utils

    weights = comfy.utils.load_torch_file(str(kit.loras / "a.safetensors"))
    return comfy.sd.load_lora_for_models(kit.model, kit.clip, weights, strength, strength)


def test_lora_as_a_hook_is_part_of_the_base(kit: Kit) -> None:
    """The same as with that LoRA loaded."""
    before = kit.outputs()
    with torch.inference_mode():
        loaded, clip = patched(kit, 0.5), hooked(kit, 0.5)
    plain = kit.merge().lora
    wanted = kit.merge(on=loaded).lora
    found = kit.merge(on=(kit.model, clip)).lora
    assert distance(wanted, plain) > 0.05
    assert distance(found, wanted) < 1e-4
    assert kit.hooks() == 0
    assert not kit.model.hook_patches
    assert not kit.model.hook_backup
    assert all(torch.equal(a, b) for a, b in zip(kit.outputs(), before, strict=True))


def test_hooks_that_change_over_the_steps_are_refused(kit: Kit) -> None:
    import comfy.hooks

    keyframes = comfy.hooks.HookKeyframeGroup()
    keyframes.add(comfy.hooks.HookKeyframe(strength=0.5, start_percent=0.3))
    with torch.inference_mode():
        clip = hooked(kit, 0.5, keyframes)
    with pytest.raises(kit.core.IterisError, match="hook schedule"):
        kit.merge(on=(kit.model, clip))


def test_patches_of_other_nodes_run(kit: Kit) -> None:
    """A patch of attention's inputs and a wrapper of the whole UNet, which may look the step up."""
    plain = kit.merge().lora
    model = kit.model.clone()
    steps: list[int] = []

    def halve(q: Any, k: Any, v: Any, extra: Any) -> Any:
        known = extra["sample_sigmas"]
        steps.extend(int((known == sigma).sum()) for sigma in extra["sigmas"])
        return q * 0.5, k, v

    model.set_model_attn2_patch(halve)
    model.set_model_unet_function_wrapper(
        lambda apply, given: apply(given["input"], given["timestep"], **given["c"]) * 0.9
    )
    found = kit.merge(on=(model, kit.clip)).lora
    assert distance(found, plain) > 1e-2
    assert steps
    assert set(steps) == {1}
    assert distance(kit.merge().lora, plain) == 0


def test_compiled_models_run_uncompiled(kit: Kit) -> None:
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    def fail(*_: Any) -> Any:
        raise AssertionError("compiled")

    plain = kit.merge().lora
    model = kit.model.clone()
    set_torch_compile_wrapper(model=model, backend=fail)
    wrappers = str(model.wrappers)
    assert distance(kit.merge(on=(model, kit.clip)).lora, plain) == 0
    assert str(model.wrappers) == wrappers


def test_another_sampling_makes_latents_again(kit: Kit) -> None:
    """Kept latents are of one MODEL and CLIP, not of all that share their weights."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    (model,) = ModelSamplingDiscrete().patch(kit.model, "v_prediction", False)
    wanted = kit.merge(on=(model, kit.clip)).lora
    kit.merge()
    again = merge_on(
        kit.merging,
        model,
        kit.clip,
        kit.concepts(),
        "iteris",
        {"precision": "float64"},
        kit.calibration,
    )
    assert distance(again.lora, wanted) == 0


def test_no_clip_is_said(kit: Kit) -> None:
    with pytest.raises(kit.core.IterisError, match="no CLIP is connected"):
        kit.merge(on=(kit.model, None))
