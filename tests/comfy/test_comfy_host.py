"""The host on MODEL and CLIP in this process: what it supports, and that it leaves nothing
behind."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kit import Kit, distance, merge_on
from thin_models import load_thin


def test_micro_batches_change_nothing(kit: Kit) -> None:
    assert distance(kit.merge(rows=3).lora, kit.merge().lora) < 1e-4


@pytest.mark.parametrize("method", ["regmean", "ssr", "chain-of-merges"])
def test_other_methods_that_run_the_model(kit: Kit, method: str) -> None:
    result = merge_on(kit.merging, kit.model, kit.clip, kit.concepts(), method, {}, kit.calibration)
    assert kit.hooks() == 0
    assert result.lora.sites


def test_base_is_untouched_by_success_and_failure(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kit.outputs()
    kit.merge()
    assert kit.hooks() == 0
    assert all(torch.equal(a, b) for a, b in zip(kit.outputs(), before, strict=True))

    def fail(error: BaseException, after: int) -> None:
        seen = 0

        class Progress:
            preview = None

            def __init__(self, _: Any) -> None: ...

            def __call__(self, progress: Any) -> None:
                nonlocal seen
                seen += progress.what == "solving sites"
                if seen > after:
                    raise error

        monkeypatch.setattr(kit.merging, "NodeProgress", Progress)
        with pytest.raises(type(error)):
            kit.merge()
        gc.collect()
        assert kit.hooks() == 0
        assert all(torch.equal(a, b) for a, b in zip(kit.outputs(), before, strict=True))

    import comfy.model_management

    fail(ValueError("broken"), after=0)
    fail(ValueError("broken"), after=10)
    fail(comfy.model_management.InterruptProcessingException(), after=5)


def test_out_of_memory_halves_the_rows(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, before = kit.merge().lora, kit.outputs()
    predict, sizes = kit.denoiser.Denoiser.predict, []

    def greedy(self: Any, latents: torch.Tensor, *rest: Any) -> torch.Tensor:
        sizes.append(len(latents))
        if len(latents) > 8:
            raise torch.OutOfMemoryError("pretended")
        return predict(self, latents, *rest)

    monkeypatch.setattr(kit.denoiser.Denoiser, "predict", greedy)
    found = kit.merge().lora
    assert max(sizes) > 8 >= sizes[-1]
    # Half as many rows round otherwise, most where the text encoder's last layers take out drift.
    assert distance(found, wanted) < 1e-3
    assert kit.hooks() == 0
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(kit.outputs(), before, strict=True))


def test_out_of_memory_while_samples_are_made(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many rows at once, from where it stopped; the sites are looked at once."""
    predict, rows = kit.sampling.RowsGuider.predict_noise, []

    def greedy(self: Any, latents: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        rows.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("pretended")
        return predict(self, latents, *rest, **options)

    wanted = kit.merge().lora
    monkeypatch.setattr(kit.sampling.RowsGuider, "predict_noise", greedy)
    assert distance(kit.merge().lora, wanted) < 1e-3
    assert rows == [8, 8, 4, *[2] * 16]  # at 16, 8, 4 and 2 at most; 8 are all
    assert kit.hooks() == 0


@contextmanager
def memory_limit(mib: int) -> Iterator[None]:
    """The system gives this process so much more and no byte beyond it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    taken = next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData"))
    kept = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (taken + (mib << 20), kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, kept)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on memory")
def test_what_to_lower_is_said_when_memory_runs_out(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kit.outputs()
    with pytest.raises(kit.core.IterisError, match="lower samples, timesteps or latent_size"):
        kit.merge(memory_budget=1000)
    kit.calibration = dataclasses.replace(kit.calibration, samples=1, timesteps=1, latent_size=60)
    samples = kit.host.ComfyHost.samples

    def limited(*given: Any) -> Any:
        with memory_limit(16):  # a tensor in feed-forward layers takes 35 MiB
            return samples(*given)

    monkeypatch.setattr(kit.host.ComfyHost, "samples", limited)
    made = "while making samples .* Tried: one row per forward. Lower image_size"
    with pytest.raises(kit.core.IterisError, match=made):
        kit.merge(rows=1)
    monkeypatch.undo()
    assert kit.hooks() == 0
    assert all(torch.equal(a, b) for a, b in zip(kit.outputs(), before, strict=True))


def gib(line: str) -> float:
    """What a line of the plan says that a stage takes."""
    return float(re.findall(r"([\d.]+) of [\d.]+ GiB", line)[0])


def test_the_plan_goes_by_what_comfyui_says_is_free(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as memory

    whole = kit.merge()
    assert "do not fit" not in whole.report.summary()
    need = max(map(gib, whole.report.plan))
    free = round(need * 0.9 * 2**30)
    monkeypatch.setattr(
        memory,
        "get_free_memory",
        lambda device=None, torch_free_too=False: (free, free) if torch_free_too else free,
    )
    result = kit.merge()
    assert all(gib(line) <= 0.81 * need + 0.01 for line in result.report.plan)
    assert result.report.plan != whole.report.plan
    assert kit.hooks() == 0


def test_rows_that_wait_in_host_memory_change_nothing(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def module(name: str) -> Any:
        return importlib.import_module(f"{kit.core.__name__}.passes.{name}")

    def planned(run: Any, stage: Any, solver: Any, batching: Any, **more: Any) -> Any:
        strategy = module("strategies").Strategy(offloads=offloads)
        return module("plan").Plan(stage, batching.rows, strategy, host_limit=2**30)

    monkeypatch.setattr(module("sweep"), "planned", planned)
    offloads = None
    there = kit.merge(rows=3).lora
    offloads = torch.device("cpu")
    parked = kit.merge(rows=3).lora
    assert distance(parked, there) < 1e-6
    assert kit.hooks() == 0


def test_rank_does_not_denoise_again(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    kit.merge()
    monkeypatch.setattr(kit.sampling, "_denoise", None)
    result = merge_on(
        kit.merging, kit.model, kit.clip, kit.concepts(), "iteris", {"rank": 2}, kit.calibration
    )
    assert result.lora.ranks == {2}


def test_lora_already_on_the_model_is_part_of_the_base(kit: Kit, models: Path) -> None:
    """Merging on a patched MODEL is merging on a checkpoint with that LoRA baked in."""
    import comfy.sd
    import comfy.utils

    extra = comfy.utils.load_torch_file(str(kit.loras / "a.safetensors"))
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(kit.model, kit.clip, extra, 0.5, 0.5)
    plain = kit.merge().lora
    found = kit.merge(on=patched).lora
    assert distance(found, plain) > 1e-3
    baked = _baked(patched, load_thin(models))
    assert distance(found, kit.merge(on=baked).lora) < 1e-4
    assert kit.hooks() == 0


def _baked(parts: tuple[Any, Any], fresh: tuple[Any, Any]) -> tuple[Any, Any]:
    """``fresh`` with the weights of ``parts``, patches and all."""
    import comfy.model_management as memory

    model, clip = parts
    with torch.inference_mode():
        memory.load_models_gpu([model, clip.patcher], force_full_load=True)
        fresh[0].model.load_state_dict(model.model.state_dict())
        fresh[1].cond_stage_model.load_state_dict(clip.cond_stage_model.state_dict())
    return fresh


def test_partial_load_gives_the_same(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the weights offloaded, with a LoRA on them that is applied as they are cast."""
    import comfy.model_management as memory
    import comfy.sd
    import comfy.utils

    extra = comfy.utils.load_torch_file(str(kit.loras / "a.safetensors"))
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(kit.model, kit.clip, extra, 0.5, 0.5)
        plain = kit.merge().lora
        whole = kit.merge(on=patched).lora
        memory.load_models_gpu([patched[0], patched[1].patcher])
        patched[0].partially_unload(patched[0].offload_device, patched[0].model_size() // 2)
    casts = [m for m in patched[0].model.modules() if getattr(m, "weight_function", None)]
    assert casts
    monkeypatch.setattr(memory, "load_models_gpu", lambda *_, **__: None)
    found = kit.merge(on=patched).lora
    # A patch that is applied while casting is not rounded to the weights' float16.
    assert distance(found, whole) < 0.05 < distance(whole, plain)
    assert kit.hooks() == 0


def test_fp8_base_weights(kit: Kit, models: Path) -> None:
    """Merging on fp8 weights is merging on those weights in any wider dtype."""
    options = {"model_options": {"dtype": torch.float8_e4m3fn}}
    eight = load_thin(models, **options)
    assert eight[0].model_dtype() == torch.float8_e4m3fn
    fresh = load_thin(models)
    with torch.inference_mode():
        state = eight[0].model.state_dict()
        fresh[0].model.load_state_dict({key: value.float() for key, value in state.items()})
    assert distance(kit.merge(on=eight).lora, kit.merge(on=fresh).lora) < 1e-4


@pytest.mark.parametrize("rows", [2, 8])
@pytest.mark.parametrize("latent_size", [8, 32])
def test_the_memory_that_is_asked_for_is_enough(
    kit: Kit, monkeypatch: pytest.MonkeyPatch, rows: int, latent_size: int
) -> None:
    """ComfyUI frees as much as it is asked for before each part runs; tensors take no more."""
    import comfy.model_management as memory

    meter = importlib.import_module(f"{kit.core.__name__}.activations.meter").MemoryMeter()
    load = memory.load_models_gpu
    asked: list[list[float]] = []  # [memory_required, live tensors before]
    peaks: list[float] = []

    def watch(models: Any, memory_required: float = 0, **more: Any) -> Any:
        if memory_required:  # ComfyUI's own calls while it encodes ask for nothing more
            if asked:
                peaks.append(meter.peak)
            asked.append([memory_required, meter.live])
            meter.peak = meter.live
        return load(models, memory_required=memory_required, **more)

    monkeypatch.setattr(memory, "load_models_gpu", watch)
    preflight = importlib.import_module(f"{kit.core.__name__}.passes.preflight")
    monkeypatch.setattr(  # two rows, with what is always left
        preflight, "unmergeable_sites", lambda *_, **__: preflight.Looked()
    )
    kit.calibration = kit.core.Calibration(
        samples=6, timesteps=3, denoising_steps=3, latent_size=latent_size
    )
    with meter:
        kit.merge({"precision": "float32"}, rows=rows)
    peaks.append(meter.peak)
    assert len(asked) >= 4  # texts and denoiser, for the samples and for the merge
    for (needed, before), peak in zip(asked, peaks, strict=True):
        assert peak - before <= needed, [(a, p - a[1]) for a, p in zip(asked, peaks, strict=True)]
