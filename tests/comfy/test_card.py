"""Behaviour that needs a card, simulated by stubs: ComfyUI's DynamicVRAM, its compiler, prefetched
weights, layers that are read without being called, quantised weights. Each test is named after its
finding.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from kit import Kit, distance
from safetensors.torch import load_file, save_file
from test_patched_models import hooked
from thin_models import load_thin
from torch import nn
from torch.nn import functional

GIB = 2**30


def of_node(kit: Kit, name: str) -> Any:
    return importlib.import_module(kit.merging.__name__.replace("merging", name))


def test_g1_weights_that_can_be_evicted_count_as_free(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DynamicVRAM leaves little free, and gives what the patcher says."""
    import comfy.model_management as memory
    from comfy.model_patcher import ModelPatcher

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        return (GIB, GIB) if torch_free_too else GIB

    monkeypatch.setattr(memory, "get_free_memory", free)
    monkeypatch.setattr(
        ModelPatcher, "get_free_memory", lambda self, device: 20 * GIB, raising=False
    )
    plan = kit.merge({"precision": "float32"}).report.plan
    assert len(plan) == 2  # texts and denoiser
    assert all("of 18.00 GiB" in line for line in plan)
    monkeypatch.setattr(of_node(kit, "comfy_runtime"), "optional", lambda path: None)
    assert all("of 0.90 GiB" in line for line in kit.merge({"precision": "float32"}).report.plan)


class Compiler:
    """ComfyUI's, which records the allocations of one forward at a time."""

    def __init__(self, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        from comfy.cli_args import args

        monkeypatch.setattr(args, "disable_comfy_compiler", False, raising=False)
        self.args, self.recording, self.recorded = args, False, 0
        self.handles = [
            network.register_forward_pre_hook(self.begin),
            network.register_forward_hook(self.end),
        ]

    def begin(self, *_: Any) -> None:
        if not self.args.disable_comfy_compiler:
            assert not self.recording, "another forward is being recorded"
            self.recording = True
            self.recorded += 1

    def end(self, *_: Any) -> None:
        self.recording = False

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def test_g2_the_compiler_is_off_while_forwards_pause(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = kit.merge(rows=3).lora
    compiler = Compiler(kit.model.model.diffusion_model, monkeypatch)
    found = kit.merge(rows=3).lora
    assert compiler.recorded == 0
    assert distance(found, wanted) == 0
    kit.outputs()
    assert compiler.recorded > 0
    compiler.remove()


class Prefetch(ModuleType):
    """ComfyUI's module of this name: while a block runs, the next one's weights are pinned, by
    what is written on the layer, which all forwards share."""

    def __init__(self) -> None:
        super().__init__("comfy.model_prefetch")
        self.pins = self.unpins = 0

    def make_prefetch_queue(self, queue: list[Any], device: Any, options: Any) -> Any:
        return [None, *queue, None] if options.get("prefetch_dynamic_vbars") else None

    def pop(self, queue: list[Any] | None) -> None:
        if queue is None:
            return
        done = queue.pop(0)
        if done is not None and hasattr(done, "_prefetch"):
            del done._prefetch
            self.unpins += 1
        if queue[0] is not None:
            queue[0]._prefetch = True
            self.pins += 1

    def watch(self, network: nn.Module, blocks: list[nn.Module]) -> list[Any]:
        """``network`` as a model of which ComfyUI prefetches the ``blocks``."""
        import greenlet

        queues: dict[Any, Any] = {}  # of every forward

        def begin(*_: Any) -> None:
            make = sys.modules["comfy.model_prefetch"].make_prefetch_queue
            queues[greenlet.getcurrent()] = make(blocks, None, {"prefetch_dynamic_vbars": True})

        def before(*_: Any) -> None:
            self.pop(queues.get(greenlet.getcurrent()))

        return [
            network.register_forward_pre_hook(begin),
            *(block.register_forward_pre_hook(before) for block in blocks),
            network.register_forward_hook(before),
        ]


def test_g3_no_weights_are_prefetched_while_forwards_pause(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.ldm.modules.attention import BasicTransformerBlock

    stub = Prefetch()
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", stub)
    network = kit.model.model.diffusion_model
    blocks = [m for m in network.modules() if isinstance(m, BasicTransformerBlock)]
    assert len(blocks) > 1
    handles = stub.watch(network, blocks)
    kit.merge(rows=3)
    assert stub.pins == stub.unpins == 0
    kit.outputs()
    assert stub.pins == stub.unpins > 0
    for handle in handles:
        handle.remove()


def test_g4_layers_are_called_that_fused_operations_would_read(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ops.linear_input_act`` reads an INT8 layer's weight, but for training."""
    import comfy.model_management as memory
    from comfy.ldm.modules.attention import FeedForward

    monkeypatch.setattr(memory, "in_training", False, raising=False)
    fused: list[bool] = []

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        *before, last = self.net
        for layer in before:
            x = layer(x)
        fused.append(not memory.in_training)
        if memory.in_training:
            return last(x)
        return functional.linear(x, last.weight.to(x), last.bias.to(x))

    wanted = kit.merge().lora
    monkeypatch.setattr(FeedForward, "forward", forward)
    found = kit.merge().lora
    assert not any(fused)
    assert distance(found, wanted) < 1e-6
    kit.outputs()
    assert fused[-1]
    assert memory.in_training is False


def test_g4_an_eager_int8_layer_is_called(pack: ModuleType) -> None:
    import comfy.ops

    if not hasattr(comfy.ops, "linear_input_act"):
        pytest.skip("this ComfyUI has no operation that reads an INT8 layer")
    layers = nn.ModuleDict({"out": nn.Linear(64, 96)})
    quantise(layers, "int8_tensorwise")
    called: list[Any] = []
    layers["out"].register_forward_hook(lambda *_: called.append(1))
    state = importlib.import_module(f"{pack.__name__}.nodes.comfy_state")
    x = torch.randn(2, 10, 64)
    with torch.no_grad():
        fused = comfy.ops.linear_input_act(layers["out"], x, "gelu_tanh")
        assert not called
        with state.ready_for_merge():
            plain = comfy.ops.linear_input_act(layers["out"], x, "gelu_tanh")
    assert len(called) == 1
    assert (plain - fused).norm() < 0.02 * fused.norm()


@pytest.mark.parametrize("end", ["success", "error", "interrupt", "out of memory"])
def test_what_was_set_for_a_merge_is_put_back(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    import comfy.model_management as memory
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_comfy_compiler", False, raising=False)
    monkeypatch.setattr(args, "disable_cuda_graphs", False, raising=False)
    monkeypatch.setattr(memory, "in_training", False, raising=False)
    stub = Prefetch()
    make = lambda *_: "a queue"  # noqa: E731
    stub.__dict__["make_prefetch_queue"] = make
    monkeypatch.setitem(sys.modules, "comfy.model_prefetch", stub)
    errors = {
        "success": None,
        "error": ValueError("broken"),
        "interrupt": memory.InterruptProcessingException(),
        "out of memory": torch.OutOfMemoryError("pretended"),
    }

    def state() -> tuple[Any, ...]:
        set_now = args.disable_comfy_compiler, args.disable_cuda_graphs, memory.in_training
        return (*set_now, stub.make_prefetch_queue([1], None, {}))

    seen: list[tuple[Any, ...]] = []
    predict = kit.denoiser.Denoiser.predict

    def run(self: Any, *given: Any) -> Any:
        seen.append(state())
        if errors[end] is not None:
            raise errors[end]
        return predict(self, *given)

    monkeypatch.setattr(kit.denoiser.Denoiser, "predict", run)
    if errors[end] is None:
        kit.merge()
    else:
        with pytest.raises((type(errors[end]), kit.core.IterisError)):
            kit.merge()
    assert set(seen) == {(True, True, True, None)}
    assert state() == (False, False, False, "a queue")
    assert stub.make_prefetch_queue is make
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


def test_what_this_comfyui_lacks_is_not_made_up(pack: ModuleType) -> None:
    internals = importlib.import_module(f"{pack.__name__}.nodes.comfy_internals")
    state = importlib.import_module(f"{pack.__name__}.nodes.comfy_state")
    before = {path: internals.optional(path) for path, _ in state.SWITCHES}
    with state.ready_for_merge():
        for path, value in state.SWITCHES:
            assert internals.optional(path) is (None if before[path] is None else value)
    assert {path: internals.optional(path) for path, _ in state.SWITCHES} == before
    with pytest.raises(AttributeError, match="not among the names"):
        internals.optional("comfy.model_management.something_else")


def test_g7_what_comfyui_has_pinned_is_not_pinned_twice(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as memory

    state = importlib.import_module(f"{pack.__name__}.nodes.comfy_state")
    places = importlib.import_module(f"{pack.__name__}.iteris_core.activations.host_pool")
    monkeypatch.setattr(places, "total_memory", lambda: 100 * GIB)
    monkeypatch.setattr(memory, "MAX_PINNED_MEMORY", 30 * GIB)
    for taken, left in ((10 * GIB, 20 * GIB), (40 * GIB, 0)):
        monkeypatch.setattr(memory, "TOTAL_PINNED_MEMORY", taken)
        with state.ready_for_merge():
            assert places.HostPool(torch.device("cuda"), 90 * GIB)._pinnable == left
    assert places.HostPool(torch.device("cuda"), 90 * GIB)._pinnable == 40 * GIB


def quantise(network: nn.Module, form: str, *, weights_alone: bool = False) -> None:
    """Linear layers of ComfyUI's mixed precision, of comfy-kitchen's eager operations; or plain
    ones with the weights that those have."""
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[form]["comfy_tensor_layout"]
    ops = comfy.ops.mixed_precision_ops({}, torch.float32)
    named = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Linear)]
    for name, plain in named:
        weight = QuantizedTensor.from_float(plain.weight.detach().float(), layout)
        if weights_alone:
            plain.weight = nn.Parameter(weight.dequantize().float(), requires_grad=False)
            continue
        layer = ops.Linear(plain.in_features, plain.out_features, plain.bias is not None)
        layer.quant_format, layer.layout_type = form, layout
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if plain.bias is not None:
            layer.bias = nn.Parameter(plain.bias.detach().float(), requires_grad=False)
        layer.weight_function, layer.bias_function = [], []
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, layer)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "nvfp4"])
def test_g9_quantised_layers_take_their_input_as_it_is(kit: Kit, models: Path, form: str) -> None:
    """A merge on them is one on their weights in any wider dtype."""
    plain, quantised = load_thin(models), load_thin(models)
    with torch.inference_mode():
        quantise(plain[0].model.diffusion_model, form, weights_alone=True)
        quantise(quantised[0].model.diffusion_model, form)
    layers = [m for m in quantised[0].model.modules() if hasattr(m, "_full_precision_mm")]
    assert layers
    kit.calibration = dataclasses.replace(kit.calibration, latents="noise")
    assert distance(kit.merge(on=quantised).lora, kit.merge(on=plain).lora) < 1e-3
    assert not any(layer._full_precision_mm for layer in layers)


def test_g12_hooks_under_dynamic_vram_are_refused_in_one_sentence(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from comfy.model_patcher import ModelPatcher

    monkeypatch.setattr(ModelPatcher, "is_dynamic", lambda self: False, raising=False)
    with torch.inference_mode():
        clip = hooked(kit, 0.5)
    clip.apply_hooks_to_conds = clip.patcher.forced_hooks
    kit.calibration = dataclasses.replace(kit.calibration, latents="noise")
    assert kit.merge(on=(kit.model, clip)).lora.sites
    monkeypatch.setattr(kit.model, "is_dynamic", lambda: True, raising=False)
    with pytest.raises(kit.core.IterisError, match=r"has hooks for MODEL.*DynamicVRAM"):
        kit.merge(on=(kit.model, clip))
    assert kit.hooks() == 0


def test_g13_inspect_runs_as_merge_does(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of inference mode have no versions, so that sites would share no moments."""
    node = of_node(kit, "inspect_node")
    hidden = type("Hidden", (), {"unique_id": None, "prompt": None})
    monkeypatch.setattr(node.InspectLoras, "hidden", hidden, raising=False)
    predict = kit.denoiser.Denoiser.predict
    modes: list[bool] = []

    def seen(self: Any, *given: Any) -> Any:
        modes.append(torch.is_inference_mode_enabled())
        return predict(self, *given)

    monkeypatch.setattr(kit.denoiser.Denoiser, "predict", seen)
    settings = {"image_size": 64, "timesteps": 2, "denoising_steps": 4, "memory": 1.0}
    with torch.inference_mode():
        node.InspectLoras.execute(
            kit.model, kit.concepts(), clip=kit.clip, samples=4, settings=settings
        )
    assert modes
    assert not any(modes)


def test_g13_a_dora_on_bytes_of_a_gguf_is_refused(kit: Kit, tmp_path: Path) -> None:
    tensors = load_file(kit.loras / "a.safetensors")
    down = next(key for key in tensors if key.startswith("lora_unet") and "lora_down" in key)
    module = down.removesuffix(".lora_down.weight")
    rows = tensors[f"{module}.lora_up.weight"].shape[0]
    path = tmp_path / "dora.safetensors"
    save_file(tensors | {f"{module}.dora_scale": torch.ones(rows, 1)}, path)
    sites = kit.lora.ComfySites(kit.model, kit.clip)
    assert sites.read_lora(path).sites
    site = sites.base.aliases[module][0].site
    layer = sites.modules[site]
    layer.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(kit.core.IterisError, match=r"DoRA.*GGUF.*load the base from a safetensors"):
        sites.read_lora(path)


def test_g13_nunchaku_is_refused_by_name(kit: Kit) -> None:
    kind = type("SVDQW4A4Linear", (nn.Module,), {"__module__": "nunchaku.models.linear"})
    kit.model.model.diffusion_model.extra = kind()
    with pytest.raises(kit.core.IterisError, match="MODEL is a Nunchaku model"):
        kit.merge()
