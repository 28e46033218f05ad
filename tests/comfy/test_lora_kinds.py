"""Every parametrisation: ΔW from our reader, against ComfyUI's own change of the weight."""

import pytest
import reduced_models
import torch
from architecture_results import record_kind
from kit import part
from safetensors.torch import save_file

LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"  # (64, 256)
CONV = "mid_block.resnets.0.conv1"  # (64, 64, 3, 3)


@pytest.fixture(scope="module")
def sdxl(pack):
    return reduced_models.sdxl()


def tensors(seed=0, **shapes):
    draw = torch.Generator().manual_seed(seed)
    named = {name.replace("__", "."): shape for name, shape in shapes.items()}
    return {name: 0.2 * torch.randn(*shape, generator=draw) for name, shape in named.items()}


ALPHA, NONE = {"alpha": torch.tensor(2.0)}, {"alpha": torch.tensor(0.0)}
KINDS = {
    "lora": (LINEAR, tensors(lora_up__weight=(64, 4), lora_down__weight=(4, 256)) | ALPHA),
    "locon": (CONV, ALPHA | tensors(
        lora_up__weight=(64, 4, 1, 1), lora_down__weight=(4, 64, 3, 3),
    )),
    "locon with mid": (CONV, ALPHA | tensors(
        lora_up__weight=(64, 4, 1, 1), lora_down__weight=(4, 64, 1, 1),
        lora_mid__weight=(4, 4, 3, 3),
    )),
    "loha": (LINEAR, ALPHA | tensors(
        hada_w1_a=(64, 3), hada_w1_b=(3, 256), hada_w2_a=(64, 3), hada_w2_b=(3, 256),
    )),
    "lokr": (LINEAR, tensors(lokr_w1=(8, 8), lokr_w2_a=(8, 2), lokr_w2_b=(2, 32)) | ALPHA),
    "lokr with full factors": (LINEAR, tensors(lokr_w1=(4, 8), lokr_w2=(16, 32))),
    "lokr of a convolution": (
        CONV, tensors(lokr_w1=(8, 8), lokr_w2_a=(8, 2), lokr_w2_b=(2, 8 * 9)) | ALPHA),
    "full difference": (LINEAR, tensors(diff=(64, 256))),
}  # fmt: skip


def both(pack, sdxl, tmp_path, site, parts):
    """ΔW of our reader, and what ComfyUI's own patching of the weight changes."""
    import comfy.lora

    name = f"lora_unet_{site.replace('.', '_')}"
    file = tmp_path / "lora.safetensors"
    named = {f"{name}.{of}": t.contiguous() for of, t in parts.items()}
    save_file(named, file)
    options = part(pack, "iteris_core.lora_files").ReadOptions(energy=1.0)
    sites = part(pack, "nodes.comfy_lora").ComfySites(*sdxl)
    ours = sites.read_lora(file, options).sites[f"unet.{site}"].dense()

    key = next(key for key, found in sites.names.items() if found == f"unet.{site}")
    patched = sdxl[0].clone()
    assert patched.add_patches(comfy.lora.load_lora(named, sites.key_map))
    (weight, _), *patches = patched.get_key_patches(key)[key]
    base = weight.float().clone()
    moved = comfy.lora.calculate_weight(patches, base.clone(), key)
    return ours, (moved - base).flatten(1).detach()


def weight_of(pack, sdxl, site):
    modules = part(pack, "nodes.comfy_lora").ComfySites(*sdxl).modules
    return modules[f"unet.{site}"].weight.detach().float().flatten(1)


@pytest.mark.parametrize("kind", KINDS)
def test_change_is_what_comfyui_adds(pack, sdxl, tmp_path, kind):
    ours, theirs = both(pack, sdxl, tmp_path, *KINDS[kind])
    error = float((ours - theirs).norm() / theirs.norm())
    assert error < 1e-5
    from comfyui_version import __version__

    record_kind(kind.split(" of ")[0].split(" with ")[0], f"ComfyUI {__version__}", error)


@pytest.mark.parametrize("site", [LINEAR, CONV])
def test_dora(pack, sdxl, tmp_path, site):
    """By inputs as ComfyUI has it. By outputs ComfyUI divides by the norm of the base's weight,
    where the paper (eq. 5), peft and LyCORIS divide by that of the changed one; we follow them."""
    kind = "lora" if site == LINEAR else "locon"
    parts, width = KINDS[kind][1], 256 if site == LINEAR else 64
    rest = (1,) * (2 if site == CONV else 0)
    scale = 1 + tensors(seed=1, m=(1, width, *rest))["m"].abs()
    ours, theirs = both(pack, sdxl, tmp_path, site, parts | {"dora_scale": scale})
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5

    scale = 1 + tensors(seed=1, m=(64, 1, *rest))["m"].abs()
    ours, theirs = both(pack, sdxl, tmp_path, site, parts | {"dora_scale": scale})
    change, _ = both(pack, sdxl, tmp_path, site, parts)
    base = weight_of(pack, sdxl, site)
    moved = base + change
    rows = scale.reshape(-1, 1)
    wanted = rows * moved / moved.norm(dim=1, keepdim=True) - base
    assert float((ours - wanted).norm() / wanted.norm()) < 1e-5
    theirs_again = rows * moved / base.norm(dim=1, keepdim=True) - base
    assert float((theirs - theirs_again).norm() / theirs_again.norm()) < 1e-5
