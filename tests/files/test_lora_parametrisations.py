"""LoCon, LoHa, LoKr, full differences and DoRA against what LyCORIS and peft compute."""

import copy
from importlib.metadata import version

import pytest
import torch
from architecture_results import record_kind
from bases import make_lora, tiny, tiny_base, trained_sites
from safetensors.torch import save_file

from iteris_core import IterisError, LoraFileError, write_lora
from iteris_core.hosts.diffusers_lora import pipeline_sites, read_lora
from iteris_core.lora_files import ReadOptions, read_lora_file

lycoris_modules = pytest.importorskip("lycoris.modules", reason="needs lycoris-lora")

LINEAR = "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "unet.mid_block.resnets.0.conv1"
POINT = "unet.mid_block.attentions.0.proj_in"
EXACT = ReadOptions(energy=1.0)


def base_weight(site):
    return pipeline_sites(tiny("sd1"))[site].weight


def train(kind: str, site: str, **options):
    """A LyCORIS module of ``kind`` on a site, with random parameters: its tensors in a file, and
    ΔW from its own forward on the columns of the unit matrix (a kernel's taps one by one)."""
    classes = {
        "locon": "locon.LoConModule",
        "loha": "loha.LohaModule",
        "lokr": "lokr.LokrModule",
        "full": "full.FullModule",
    }
    file, _, name = classes[kind].partition(".")
    module = __import__(f"lycoris.modules.{file}", fromlist=[name])
    name_in_file = "lora_unet_" + site.removeprefix("unet.").replace(".", "_")
    layer = copy.deepcopy(pipeline_sites(tiny("sd1"))[site]).requires_grad_(False)
    base = layer.weight.clone()
    adapter = getattr(module, name)(name_in_file, layer, 1.0, **options).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter_name, parameter in adapter.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter_name == "dora_scale":
            parameter.data *= 1 + noise.abs()
        elif parameter_name != "bias":  # a LoRA cannot say that
            parameter.data = 0.2 * noise
    with torch.no_grad():
        adapter.apply_to()
        written = adapter.custom_state_dict() or adapter.state_dict()
        tensors = {
            f"{name_in_file}.{key}": written[key] for key in adapter.weight_list if key in written
        }
        layer.stride = (1, 1)
        moved = layer(impulses(base)) - layer(0 * impulses(base))
    wanted = moved.mT if base.ndim == 2 else taps(moved, base)
    return tensors, (wanted - base.flatten(1)).detach()


def impulses(weight):
    """One row per input of a Linear; one picture per channel with a dot in the middle of it."""
    width = weight.shape[1]
    if weight.ndim == 2:
        return torch.eye(width)
    pictures = torch.zeros(width, width, 7, 7)
    pictures[range(width), range(width), 3, 3] = 1
    return pictures


def taps(response, weight):
    """(out, in·kh·kw) from the responses to a dot: a kernel turned round."""
    kh, kw = weight.shape[2:]
    window = response[:, :, 3 - kh // 2 : 4 + kh // 2, 3 - kw // 2 : 4 + kw // 2].flip(2, 3)
    return window.transpose(0, 1).flatten(1)


def read(tmp_path, tensors, options=EXACT, weight=base_weight):
    path = tmp_path / "lora.safetensors"
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
    return read_lora_file(path, tiny_base("sd1"), weight, options)


CASES = [
    ("locon", CONV, {"lora_dim": 4, "alpha": 2}, 4),
    ("locon", CONV, {"lora_dim": 4, "alpha": 2, "use_tucker": True}, 4),
    ("locon", POINT, {"lora_dim": 4, "alpha": 4}, 4),
    ("locon", LINEAR, {"lora_dim": 4, "alpha": 1, "rs_lora": True}, 4),
    ("loha", LINEAR, {"lora_dim": 4, "alpha": 2}, 16),
    ("loha", LINEAR, {"lora_dim": 9, "alpha": 2}, None),
    ("loha", CONV, {"lora_dim": 4, "alpha": 1}, 16),
    ("loha", POINT, {"lora_dim": 4, "alpha": 1}, 16),
    ("lokr", LINEAR, {"lora_dim": 2, "alpha": 1, "factor": 8}, 16),
    ("lokr", LINEAR, {"lora_dim": 2, "alpha": 1, "factor": 16, "decompose_both": True}, 4),
    ("lokr", LINEAR, {"lora_dim": 4, "alpha": 1, "factor": 4, "full_matrix": True}, None),
    ("lokr", LINEAR, {"lora_dim": 99, "alpha": 5, "factor": -1}, None),
    ("lokr", LINEAR, {"lora_dim": 2, "factor": 4, "unbalanced_factorization": True}, 8),
    ("lokr", CONV, {"lora_dim": 2, "alpha": 1, "factor": 8}, 16),
    ("lokr", POINT, {"lora_dim": 2, "alpha": 1, "factor": 8}, 16),
    ("full", LINEAR, {}, None),
    ("full", CONV, {}, None),
]


@pytest.mark.parametrize(("kind", "site", "options", "rank"), CASES)
def test_against_lycoris(kind, site, options, rank, tmp_path):
    tensors, wanted = train(kind, site, **options)
    lora = read(tmp_path, tensors)
    change = lora.sites[site]
    error = float((change.dense() - wanted).norm() / wanted.norm())
    assert error < 1e-5
    title = {"full": "full difference"}.get(kind, kind)
    record_kind(title, f"LyCORIS {version('lycoris-lora')}", error)
    if rank is not None:  # exactly low rank, without any decomposition
        assert change.rank == rank
        assert lora.notes == []
    else:
        assert change.rank <= min(change.shape)
        assert "extracted" in lora.notes[0]
    for layout in ("kohya", "peft"):
        path = write_lora(lora, tmp_path / f"{layout}.safetensors", layout=layout, dtype="float32")
        again = read_lora_file(path, tiny_base("sd1"))
        assert torch.equal(again.sites[site].dense(), change.dense())


@pytest.mark.parametrize("kind", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("site", [LINEAR, CONV, POINT])
@pytest.mark.parametrize("on_output", [True, False])
def test_dora_of_both_axes_against_lycoris(kind, site, on_output, tmp_path):
    options = {"lora_dim": 4, "alpha": 2, "weight_decompose": True, "wd_on_out": on_output}
    tensors, wanted = train(kind, site, **options)
    lora = read(tmp_path, tensors)
    error = float((lora.sites[site].dense() - wanted).norm() / wanted.norm())
    assert error < 1e-5
    record_kind("dora", f"LyCORIS {version('lycoris-lora')}", error)
    with pytest.raises(LoraFileError, match="is a DoRA, which needs the base model's weights"):
        read(tmp_path, tensors, weight=None)


@pytest.mark.parametrize("site", [LINEAR, CONV])
def test_dora_of_peft(site, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    unet = copy.deepcopy(tiny("sd1").unet)
    config = LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=[site.partition(".")[2]])
    inject_adapter_in_model(config, unet)
    layer = unet.get_submodule(site.partition(".")[2])
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data *= 1 + torch.rand(parameter.shape, generator=generator)
    tensors = {f"unet.{k}": v for k, v in get_peft_model_state_dict(unet).items()}
    layer.merge()
    wanted = (layer.get_base_layer().weight - base_weight(site)).detach()
    lora = read(tmp_path, {k: v.contiguous() for k, v in tensors.items()})
    error = float((lora.sites[site].dense() - wanted.flatten(1)).norm() / wanted.norm())
    assert error < 1e-5


def dora_file(tmp_path):
    tensors, wanted = train("locon", LINEAR, lora_dim=4, alpha=2, weight_decompose=True)
    path = tmp_path / "lora.safetensors"
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path)
    return path, wanted


def test_dora_on_a_base_of_eight_bits_is_refused(tmp_path):
    """bitsandbytes keeps int8 weights of the full shape, and their scales beside them."""
    path, _ = dora_file(tmp_path)
    pipeline = copy.copy(tiny("sd1"))
    pipeline.unet = copy.deepcopy(pipeline.unet)
    site = pipeline_sites(pipeline)[LINEAR]
    packed = (site.weight * 127 / site.weight.abs().max()).round().to(torch.int8)
    site.weight = torch.nn.Parameter(packed, requires_grad=False)
    with pytest.raises(IterisError, match=f"weight of {LINEAR}, but it is quantised"):
        read_lora(pipeline, pipeline_sites(pipeline), path)


def test_dora_on_a_base_that_is_offloaded(tmp_path):
    from accelerate import cpu_offload

    path, wanted = dora_file(tmp_path)
    pipeline = copy.copy(tiny("sd1"))
    pipeline.unet = copy.deepcopy(pipeline.unet)
    cpu_offload(pipeline.unet, torch.device("cpu"))
    sites = pipeline_sites(pipeline)
    assert sites[LINEAR].weight.is_meta
    lora = read_lora(pipeline, sites, path, EXACT)
    error = float((lora.sites[LINEAR].dense() - wanted).norm() / wanted.norm())
    assert error < 1e-5
    assert sites[LINEAR].weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn,
                                   torch.float8_e5m2, torch.float64])  # fmt: skip
def test_every_dtype_is_read_as_it_is(dtype, tmp_path):
    tensors, _ = train("locon", LINEAR, lora_dim=4, alpha=2)
    cast = {k: v if k.endswith("alpha") else v.to(dtype) for k, v in tensors.items()}
    up, down = (next(v for k, v in cast.items() if part in k) for part in ("up", "down"))
    change = read(tmp_path, cast).sites[LINEAR]
    assert torch.equal(change.dense(), up.float() * 0.5 @ down.float())


def test_a_lora_of_another_width_is_said_to_be_of_another_base(tmp_path):
    tensors, _ = train("locon", LINEAR, lora_dim=4, alpha=2)
    key = next(key for key in tensors if "down" in key)
    name, inputs = key.partition(".")[0], tensors[key].shape[1]
    wide = {**tensors, key: torch.ones(4, 999)}
    said = rf"{name} was made for another base: it has .* this base's layer takes {inputs} inputs"
    with pytest.raises(LoraFileError, match=said):
        read(tmp_path, wide)
    known = {**tensors, "lora_unet_other.lora_up.weight": torch.ones(4, 4)}
    with pytest.raises(LoraFileError, match=r"1 of 4 tensors have no layer in this base, such as"):
        read(tmp_path, known)


REFUSED = [
    ("diff_b", torch.ones(32), "a change of a bias"),
    ("w_norm", torch.ones(32), "a change of a normalisation"),
    ("oft_blocks", torch.ones(2, 4, 4), "OFT or BOFT"),
    ("a1.weight", torch.ones(2, 4), "GLoRA"),
    ("hada_t1", torch.ones(2, 2, 3, 3), "in Tucker's form"),
    ("on_input", torch.ones(4), "IA3"),
    ("mystery", torch.ones(4), "is of an unknown kind"),
]


@pytest.mark.parametrize(("leaf", "tensor", "message"), REFUSED)
def test_what_cannot_be_said_is_named_or_listed(leaf, tensor, message, tmp_path):
    tensors, wanted = train("locon", LINEAR, lora_dim=4, alpha=2)
    key = "lora_unet_mid_block_attentions_0_norm." + leaf
    with pytest.raises(LoraFileError, match=f"{key}.*{message}.*use option allow_partial"):
        read(tmp_path, {**tensors, key: tensor})
    lora = read(tmp_path, {**tensors, key: tensor}, ReadOptions(allow_partial=True, energy=1.0))
    assert torch.allclose(lora.sites[LINEAR].dense(), wanted, atol=1e-6)
    assert len(lora.notes) == 1
    assert lora.notes[0].startswith(f"left out: {key}")
    assert message in lora.notes[0]
    advice = "is not a LoRA" if leaf == "mystery" else "Nothing in it is a low-rank change"
    with pytest.raises(LoraFileError, match=advice):
        read(tmp_path, {key: tensor}, ReadOptions(allow_partial=True))


def test_a_file_for_another_model_is_named(tmp_path):
    sites = [s for s in trained_sites("sdxl") if s.startswith("unet.down_blocks.1.")]
    other = write_lora(make_lora("sdxl", sites), tmp_path / "xl.safetensors")
    message = r"xl\.safetensors is a LoRA for SDXL, but the base is SD 1\.x"
    with pytest.raises(LoraFileError, match=message):
        read_lora_file(other, tiny_base("sd1"))


def test_parts_of_a_module_under_two_names_are_an_error(tmp_path):
    """Loaders differ in whether such an alpha counts."""
    tensors, _ = train("locon", LINEAR, lora_dim=4, alpha=2)
    mixed = {
        k.replace("lora_unet_", "lycoris_") if k.endswith(".alpha") else k: v
        for k, v in tensors.items()
    }
    assert mixed.keys() != tensors.keys()
    with pytest.raises(LoraFileError, match="once and under one name"):
        read(tmp_path, mixed)
