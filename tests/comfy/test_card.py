"""Behaviour that needs a card, simulated by stubs: ComfyUI's DynamicVRAM, its compiler, prefetched
weights, layers that are read without being called.
"""

import sys
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from kit import part
from safetensors.torch import load_file, save_file
from torch import nn


@pytest.mark.parametrize("end", ["success", "error", "interrupt", "out of memory"])
def test_what_forwards_cannot_pause_with_is_off_during_a_merge(kit, monkeypatch, end):
    """The compiler, CUDA graphs and prefetched weights, of one forward at a time, and operations
    that read a layer without calling it. All are put back."""
    import comfy.model_management as memory
    from comfy.cli_args import args

    stub = ModuleType("comfy.model_prefetch")
    make = stub.__dict__["make_prefetch_queue"] = lambda *_: "a queue"
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    for owner, name in (
        (args, "disable_comfy_compiler"),
        (args, "disable_cuda_graphs"),
        (memory, "in_training"),
    ):
        monkeypatch.setattr(owner, name, False, raising=False)
    error = {
        "success": None,
        "error": ValueError("broken"),
        "interrupt": memory.InterruptProcessingException(),
        "out of memory": torch.OutOfMemoryError("pretended"),
    }[end]

    def state():
        off = args.disable_comfy_compiler, args.disable_cuda_graphs, memory.in_training
        return (*off, stub.__dict__["make_prefetch_queue"]([1], None, {}))

    seen: list[tuple[Any, ...]] = []

    def look(*_):
        seen.append(state())
        if error is not None:
            raise error

    handle = kit.model.model.diffusion_model.register_forward_pre_hook(look)
    if error is None:
        kit.merge()
    else:
        with pytest.raises((type(error), kit.core.IterisError)):
            kit.merge()
    handle.remove()
    assert set(seen) == {(True, True, True, None)}
    assert state() == (False, False, False, "a queue")
    assert stub.__dict__["make_prefetch_queue"] is make


def test_fused_operations_run_unfused_and_with_gradients(pack):
    """An INT8 layer that is read would not be seen; gradients pass through a rotation."""
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    state = part(pack, "nodes.comfy_state")
    if hasattr(comfy.ops, "linear_input_act"):
        layer = comfy.ops.mixed_precision_ops({}, torch.float32).Linear(64, 96, False)
        layer.quant_format = "int8_tensorwise"
        layer.layout_type = QUANT_ALGOS["int8_tensorwise"]["comfy_tensor_layout"]
        weight = QuantizedTensor.from_float(torch.randn(96, 64), layer.layout_type)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.weight_function, layer.bias_function, layer.bias = [], [], None
        called: list[Any] = []
        layer.register_forward_hook(lambda *_: called.append(1))
        with torch.no_grad(), state.ready_for_merge():
            comfy.ops.linear_input_act(layer, torch.randn(2, 10, 64), "gelu_tanh")
        assert called
    kitchen = pytest.importorskip("comfy_kitchen")
    angles = torch.randn(1, 1, 8, 8)
    cos, sin = angles.cos(), angles.sin()
    turns = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    x = torch.randn(1, 2, 8, 16, requires_grad=True)
    with state.training():
        plain, _ = kitchen.apply_rope(x, x, turns)
    assert torch.allclose(plain, kitchen.apply_rope1(x.detach(), turns), atol=1e-5)
    plain.square().sum().backward()
    assert torch.allclose(x.grad, 2 * x, atol=1e-4)  # a turn keeps lengths


def test_a_dora_on_bytes_of_a_gguf_is_refused(kit):
    tensors = load_file(kit.loras / "a.safetensors")
    down = next(key for key in tensors if key.startswith("lora_unet") and "lora_down" in key)
    module = down.removesuffix(".lora_down.weight")
    rows = tensors[f"{module}.lora_up.weight"].shape[0]
    path = kit.loras / "dora.safetensors"
    save_file(tensors | {f"{module}.dora_scale": torch.ones(rows, 1)}, path)
    sites = kit.lora.ComfySites(kit.model, kit.clip)
    assert sites.read_lora(path).sites
    layer = sites.modules[sites.base.aliases[module][0].site]
    layer.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(kit.core.IterisError, match=r"DoRA.*GGUF.*load the base from a safetensors"):
        sites.read_lora(path)


def test_forwards_run_with_their_own_card_as_the_current_one(kit, monkeypatch):
    """Kernels that take no device from their tensors run on it. Later versions set it where they
    sample and encode; here CLIP and MODEL lie on devices of different names."""
    import comfy.model_management as memory

    current: list[torch.device | None] = [None]
    seen: list[tuple[str, torch.device | None]] = []

    @contextmanager
    def card(device):
        before, current[0] = current[0], device
        yield
        current[0] = before

    monkeypatch.setattr(memory, "cuda_device_context", card, raising=False)
    second = kit.model.load_device = torch.device("cpu", 0)
    first = kit.clip.patcher.load_device
    for name, module in (
        ("text", kit.clip.cond_stage_model.clip_l.transformer),
        ("denoiser", kit.model.model.diffusion_model),
    ):
        module.register_forward_pre_hook(lambda *_, name=name: seen.append((name, current[0])))
    kit.merge()
    assert {*seen} == {("text", first), ("denoiser", second)}
    assert current == [None]
