"""Written files: what diffusers reads of them, and sd-scripts' names. For any LoRA in every layout
see test_written_layouts.py."""

import copy
import hashlib
from dataclasses import replace

import pytest
import torch
from bases import make_lora, outputs, tiny, tiny_base
from safetensors import safe_open
from safetensors.torch import load_file
from test_lora_layouts import furthest, with_changes

from iteris_core import Lora, LowRank, write_lora
from iteris_core.lora_files import read_lora_file, released_base, to_tensors


def assert_same(one: Lora, two: Lora):
    assert set(one.sites) == set(two.sites)
    for site, change in one.sites.items():
        assert torch.equal(change.dense(), two.sites[site].dense()), site


def assert_all_keys_were_taken(caplog):
    assert "unexpected keys" not in caplog.text
    assert "missing keys" not in caplog.text


@pytest.mark.parametrize(("kind", "ours", "site", "rest"), [
    ("flux", "kohya", "transformer.x_embedder", "write peft"),
    ("flux", "kohya", "transformer.proj_out", "write peft"),
    ("flux", "peft", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", "ComfyUI does"),
    ("sd3", "kohya", "transformer.transformer_blocks.0.attn.to_q", "write peft"),
])  # fmt: skip
def test_what_diffusers_does_not_read_is_warned_of(kind, ours, site, rest, tmp_path, caplog):
    block = next(s for s in tiny_base(kind).shapes if ".transformer_blocks.0.attn" in s)
    own = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    lora = make_lora(kind, list(dict.fromkeys([site, own, block])))
    path = write_lora(lora, tmp_path / "a.safetensors", layout=ours, dtype="float32")
    assert "diffusers does not read" in caplog.text
    assert site in caplog.text
    assert rest in caplog.text
    pipeline = copy.deepcopy(tiny(kind))
    truth = outputs(kind, with_changes(kind, lora))
    try:
        pipeline.load_lora_weights(str(path))
    except (KeyError, ValueError):  # SD 3
        return
    assert furthest(outputs(kind, pipeline), truth) > 1e-4


@pytest.mark.parametrize("ranks", [(2, 4), (4, 2)])
def test_a_name_that_ends_another_has_a_rank_of_its_own(ranks, tmp_path, caplog):
    """FLUX has ``proj_out`` and ``single_transformer_blocks.0.proj_out``; peft fits ends."""
    sites = ["transformer.proj_out"]
    sites += [f"transformer.single_transformer_blocks.{n}.proj_out" for n in (0, 1)]
    one, rest = (make_lora("flux", own, ranks=(r,)) for own, r in
                 zip((sites[:1], sites[1:]), ranks, strict=True))  # fmt: skip
    lora = Lora({**one.sites, **rest.sites}, base=one.base)
    path = write_lora(lora, tmp_path / "a.safetensors", layout="peft", dtype="float32")
    pipeline = copy.deepcopy(tiny("flux"))
    pipeline.load_lora_weights(str(path))
    assert_all_keys_were_taken(caplog)
    assert furthest(outputs("flux", pipeline), outputs("flux", with_changes("flux", lora))) < 1e-5
    assert_same(read_lora_file(path, tiny_base("flux")), lora)


# Names of LoRANetwork(…, conv_lora_dim=1) of sd-scripts at 48d368fa on its own UNets, with
# transformers 4's names of the text encoders: how many, and SHA-256 of them sorted, one a line.
SD_SCRIPTS = {
    "sd1": (350, "44edcda39c26243367a6d85165b42ad157964a5a7c4a8e22d6d6f97b71ee6549"),
    "sdxl": (1052, "231dc80db7c1b20b12efab0fb99c7afe268c7a1f392eff7107847e4b2f94d651"),
}


def trainable(site: str) -> bool:
    """What sd-scripts' networks.lora can train: attention blocks, resnets, CLIP's layers."""
    if site.startswith("text"):
        return ".self_attn." in site or ".mlp." in site
    return any(part in site for part in (".attentions.", ".resnets.", "samplers."))


@pytest.mark.parametrize("kind", SD_SCRIPTS)
def test_names_of_a_whole_real_model_are_those_of_sd_scripts(kind, tmp_path):
    base = released_base(kind)
    sites = [site for site in base.shapes if trainable(site)]
    one = torch.full((1, 1), 0.5)
    changes = {}
    for site in sites:
        shape = base.shapes[site]
        width = shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)
        kernel = tuple(shape[2:]) or None
        changes[site] = LowRank(one.expand(shape[0], 1), one.expand(1, width), kernel)
    path = write_lora(Lora(changes, base=base), tmp_path / "a.safetensors")
    tensors = load_file(path)
    names = sorted({key.split(".")[0] for key in tensors})
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert (len(names), digest) == SD_SCRIPTS[kind]
    leaves = {key.partition(".")[2] for key in tensors}
    assert leaves == {"lora_down.weight", "lora_up.weight", "alpha"}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("1", "1")
    assert metadata["ss_base_model_version"] == base.architecture.version


def test_diffusers_converts_a_kohya_file_for_the_real_flux(tmp_path):
    """Its converter splits linear1 at the real width, so no tiny pipeline can hold against it."""
    from diffusers import FluxPipeline

    base = released_base("flux")
    parts = ("r.transformer_blocks.18.", "single_transformer_blocks.37.", "layers.1.self")
    sites = [s for s in base.shapes if any(part in s for part in parts) and "_2." not in s]
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for index, site in enumerate(sites):
        out, fan = base.shapes[site]
        up = torch.randn(out, 1 + index % 2, generator=generator)
        changes[site] = LowRank(up, torch.randn(1 + index % 2, fan, generator=generator) / fan**0.5)
    path = write_lora(Lora(changes, base=base), tmp_path / "a.safetensors", dtype="float32")
    theirs = FluxPipeline.lora_state_dict(load_file(path))
    denoiser = {k.partition(".lora_")[0] for k in theirs if k.startswith("transformer.")}
    assert denoiser == {site for site in sites if site.startswith("transformer.")}
    for site in sorted(denoiser):
        x = torch.randn(base.shapes[site][1], 64, dtype=torch.float64, generator=generator)
        up, down = (theirs[f"{site}.lora_{side}.weight"].double() for side in "BA")
        found = up @ (down @ x)
        wanted = changes[site].up.double() @ (changes[site].down.double() @ x)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5, site
    assert len(theirs) == 2 * len(sites)


def test_a_projection_under_another_prefix_brings_no_zeros():
    """ComfyUI has names of its own for it; zeros under a second name would take a layer's place."""
    base = tiny_base("sdxl")
    assert "lora_te2_text_projection" in base.written
    names = {n.replace("te2_text_proj", "te9_text_proj"): a for n, a in base.written.items()}
    base = replace(base, written=names)
    lora = make_lora("sdxl", [site for site in base.shapes if site.startswith("text_encoder_2.")])
    tensors, _ = to_tensors(replace(lora, base=base), dtype="float32")
    assert "lora_te9_text_projection.lora_up.weight" in tensors
    assert all(bool(tensor.any()) for tensor in tensors.values())
