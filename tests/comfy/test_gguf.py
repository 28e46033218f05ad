"""City96's loader of GGUF files (ComfyUI-GGUF): merging on layers that it keeps quantised.

Needs COMFYUI_GGUF, a checkout of the pack, and the package gguf, which writes a small file.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import Trial
from gradient_check import check_gradients
from kit import part
from reduced_models import Reduced, flux
from reduced_models.flux import config
from safetensors.torch import load_file, save_file
from torch import Tensor

gguf: Any = pytest.importorskip("gguf", reason="needs gguf")
FOLDER = os.environ.get("COMFYUI_GGUF", "")
pytestmark = pytest.mark.skipif(not FOLDER, reason="needs ComfyUI-GGUF in COMFYUI_GGUF")
SITE = "diffusion_model.double_blocks.0.img_mlp.0"


@pytest.fixture(scope="module")
def loader(pack):
    """The pack's modules, imported as ComfyUI does."""
    name = "custom-nodes/ComfyUI-GGUF"
    spec = importlib.util.spec_from_file_location(
        name, Path(FOLDER) / "__init__.py", submodule_search_locations=[FOLDER]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ops = importlib.import_module(f"{name}.ops")
    dequantised = ops.dequantize_tensor

    def plain(*args):
        """Under torch 2.13 the pack's own way from its class to a plain tensor fails."""
        return dequantised(*args).as_subclass(Tensor)

    ops.dequantize_tensor = plain
    return lambda part: importlib.import_module(f"{name}.{part}")


def gguf_flux(loader, folder, kind):
    """A reduced FLUX from a file whose matrices are of ``kind``, as Unet Loader (GGUF) gives it."""
    import comfy.supported_models

    model, clip = flux()
    types = gguf.GGMLQuantizationType
    writer = gguf.GGUFWriter(folder / "flux.gguf", "flux")
    for name, weight in model.model.diffusion_model.state_dict().items():
        block = types[kind] if weight.ndim == 2 and weight.shape[1] % 32 == 0 else types.F32
        data = gguf.quants.quantize(weight.float().numpy(), block)
        writer.add_tensor(name, data, raw_dtype=block)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = loader("loader").gguf_sd_loader(folder / "flux.gguf")
    known = comfy.supported_models.Flux(config(vec_in_dim=768))
    known.custom_operations = loader("ops").GGMLOps()
    known.set_inference_dtype(torch.float32, None)
    made = known.get_model({}, "")
    made.load_model_weights(tensors, "")
    model.model = made
    return loader("nodes").GGUFModelPatcher.clone(model), clip


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "BF16"])
def test_a_merge(pack, loader, tmp_path, kind):
    trial = Trial(pack, Reduced(lambda: gguf_flux(loader, tmp_path, kind)), tmp_path)
    weight = trial.model.model.diffusion_model.double_blocks[0].img_mlp[0].weight
    assert not weight.is_floating_point()
    bytes_before = weight.data.clone()
    assert trial.alone() < 1e-3
    rows, file = trial.rows_and_file()
    assert rows < 5e-3
    assert file < 1e-3
    assert torch.equal(weight.data, bytes_before)


def test_a_dora_is_of_the_weight_that_the_pack_makes_of_its_bytes(pack, loader, tmp_path):
    trial = Trial(pack, Reduced(lambda: gguf_flux(loader, tmp_path, "Q8_0")), tmp_path)
    layer = trial.model.model.diffusion_model.double_blocks[0].img_mlp[0]
    tensors = {k: t for k, t in load_file(trial.paths[0][0]).items() if k.startswith(f"{SITE}.")}
    scale = 1 + torch.rand(256, 1, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "dora.safetensors"
    save_file({**tensors, f"{SITE}.dora_scale": scale}, path)
    sites = trial.lora.ComfySites(trial.model, trial.clip)
    options = importlib.import_module(f"{pack.__name__}.iteris_core.lora_files").ReadOptions
    found = next(iter(sites.read_lora(path, options(energy=1.0)).sites.values()))
    base = loader("ops").dequantize_tensor(layer.weight, torch.float32)
    moved = base + tensors[f"{SITE}.lora_B.weight"] @ tensors[f"{SITE}.lora_A.weight"]
    wanted = scale * moved / moved.norm(dim=1, keepdim=True) - base
    assert float((found.dense() - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_steps(pack, loader, tmp_path, monkeypatch, kind):
    """On layers as the loading node gives them: in inference mode."""
    with torch.inference_mode():
        trial = Trial(pack, Reduced(lambda: gguf_flux(loader, tmp_path, kind)), tmp_path)
    weight = trial.model.model.diffusion_model.double_blocks[0].img_mlp[0].weight
    assert weight.is_inference()
    gradients = part(pack, "iteris_core.methods.row_gradients").RowGradients
    thresholds = part(pack, "iteris_core.solve.choose").THRESHOLDS

    def merge(chosen):
        monkeypatch.setitem(trial.merging.merge_on.__kwdefaults__, "thresholds", chosen)
        return trial.merge(2, steps=1)

    with torch.inference_mode():
        result = check_gradients(monkeypatch, gradients, thresholds, merge)
    assert "denoiser: 1 taken" in result.report.notes["steps"]
    assert trial.model.model.diffusion_model.double_blocks[0].img_mlp[0].weight is weight
    assert trial.unchanged()
