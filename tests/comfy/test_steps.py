"""Steps through the whole denoiser, on ComfyUI's classes as its nodes load them: in inference mode,
quantised, half in host memory; and what they leave of a MODEL."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from figures import Trial, furthest
from gradient_check import check_gradients
from kit import part
from reduced_models import ARCHITECTURES
from test_base import quantised

FAST = "SD 1.5", "FLUX.1"
SLOW = "SDXL", "SD 3.5 medium", "FLUX.2", "Z-Image", "Wan 2.2 14B", "Qwen-Image", "LTX-Video"


def checked(pack, monkeypatch, merge):
    kind = part(pack, "iteris_core.methods.row_gradients").RowGradients
    thresholds = part(pack, "iteris_core.solve.choose").THRESHOLDS
    with torch.inference_mode():
        return check_gradients(monkeypatch, kind, thresholds, merge)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_gradients_are_right_where_blocks_change_tensors_in_place(
    pack, tmp_path, monkeypatch, name
):
    trial = Trial(pack, ARCHITECTURES[name], tmp_path)

    def merge(thresholds):
        given = trial.merging.merge_on.__kwdefaults__
        monkeypatch.setitem(given, "thresholds", thresholds)
        return trial.merge(2, steps=1)

    notes = checked(pack, monkeypatch, merge).report.notes["steps"]
    assert sum(note.endswith(": 1 taken") for note in notes) == len(trial.models)
    assert trial.unchanged()


@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4"])
def test_quantised_layers(kit, monkeypatch, form):
    kit.calibration = dataclasses.replace(kit.calibration, latents="noise")
    on = quantised(kit, form)
    checked(kit.pack, monkeypatch, lambda chosen: kit.merge({"steps": 1}, on=on, thresholds=chosen))


@pytest.mark.parametrize("name", FAST)
def test_a_merge_with_steps(pack, tmp_path, name):
    """They come closer on the merge's rows, and its base draws bit by bit what it drew."""
    kind, losses = part(pack, "iteris_core.methods.row_gradients").RowGradients, []
    trial = Trial(pack, ARCHITECTURES[name], tmp_path)
    add = kind.add

    def watched(self, rows, *, first):
        add(self, rows, first=first)
        if first:  # no trial
            gap = self._outputs(rows, 1, merged=True) - self._outputs(rows, 0)
            weights = torch.tensor([self._weights[row] for row in rows])
            losses.append(float((weights * gap.flatten(1).square().sum(1)).mean()))

    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        plain = trial.merge(2)
        patched.setattr(kind, "add", watched)
        result = trial.merge(2, steps=8)
    assert "denoiser: 8 taken" in result.report.notes["steps"]
    assert sum(losses[-3:]) < sum(losses[:3])
    if "so they are kept" in result.report.notes["steps"][-1]:
        assert furthest(result, plain) > 0
    (line,) = (line for line in result.report.plan if "steps" in line)
    assert line.startswith("steps through the denoiser: 16 of 16 rows at once, ")
    assert trial.unchanged()


def test_an_interrupt_in_the_backward_pass(kit, monkeypatch):
    """ComfyUI's layers ask for it, too, and so while blocks run again, as where memory is short."""
    import comfy.model_management as memory

    before = kit.outputs()
    gradients = part(kit.pack, "iteris_core.activations.gradients")
    always = property(lambda self: True, lambda self, value: None)
    monkeypatch.setattr(gradients.Network, "replays", always)
    rerun = gradients._Rerun
    backward, left = rerun.backward, [30]

    def stop(ctx, *wanted):
        left[0] -= 1
        if not left[0]:
            memory.interrupt_current_processing()
        return backward(ctx, *wanted)

    monkeypatch.setattr(rerun, "backward", staticmethod(stop))
    with pytest.raises(memory.InterruptProcessingException):
        kit.merge({"steps": 3})
    assert kit.unchanged(before)


@pytest.mark.parametrize("patched", [False, True])
def test_attention_without_gradients_is_replaced(kit, monkeypatch, patched):
    """As with --use-sage-attention, or by another pack's override; it is there again afterwards."""
    from comfy.ldm.modules import attention

    def attention_sage(*args, **kwargs):
        return attention.attention_pytorch(*args, **kwargs).detach()

    model = kit.model.clone()
    if patched:
        options = model.model_options["transformer_options"]
        options["optimized_attention_override"] = lambda func, *a, **k: attention_sage(*a, **k)
    else:
        sage = attention.wrap_attn(attention_sage)
        monkeypatch.setattr(attention, "optimized_attention", sage)
    before = dict(model.model_options["transformer_options"])
    merge = lambda chosen: kit.merge(  # noqa: E731
        {"steps": 1}, on=(model, kit.clip), thresholds=chosen
    )
    checked(kit.pack, monkeypatch, merge)
    assert model.model_options["transformer_options"] == before


def test_a_model_that_is_half_in_host_memory(kit, monkeypatch):
    """With a LoRA on it that is applied as weights are cast."""
    import comfy.model_management as memory

    patched = kit.stock("c.safetensors", 0.5)
    with torch.inference_mode():
        memory.load_models_gpu([patched[0], patched[1].patcher])
        patched[0].partially_unload(patched[0].offload_device, patched[0].model_size() // 2)
    assert any(getattr(m, "weight_function", None) for m in patched[0].model.modules())
    monkeypatch.setattr(memory, "load_models_gpu", lambda *_, **__: None)
    checked(
        kit.pack, monkeypatch, lambda chosen: kit.merge({"steps": 1}, on=patched, thresholds=chosen)
    )


def test_a_control_net_beside_the_model(kit, monkeypatch):
    """Its weights, too, were loaded in inference mode; what it adds is a constant."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    with torch.inference_mode():
        torch.manual_seed(0)
        network = comfy.cldm.cldm.ControlNet(
            image_size=32, in_channels=4, hint_channels=3, model_channels=32, channel_mult=[1, 2],
            num_res_blocks=[1, 1], transformer_depth=[0, 1], transformer_depth_middle=1,
            num_head_channels=32, use_spatial_transformer=True, context_dim=64, legacy=False,
            operations=comfy.ops.disable_weight_init,
        )  # fmt: skip
        for weight in network.parameters():
            weight.copy_(0.05 * torch.randn(weight.shape))
        control = comfy.controlnet.ControlNet(network, load_device=kit.model.load_device)
        control.set_cond_hint(torch.rand(1, 3, 64, 64), 1.0)
    conds = part(kit.pack, "nodes.comfy_conds")
    references = conds.References({"control": control})
    ran = []
    network.register_forward_hook(lambda *_: ran.append(torch.is_grad_enabled()))
    merge = lambda chosen: kit.merge(  # noqa: E731
        {"steps": 1}, references=references, thresholds=chosen
    )
    before = [weight.clone() for weight in network.parameters()]
    checked(kit.pack, monkeypatch, merge)
    assert True in ran
    assert all(map(torch.equal, before, network.parameters()))
    assert all(weight.is_inference() for weight in network.parameters())
