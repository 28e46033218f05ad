"""LoRAs at a lower rank: which components are kept, on what, and in which files."""

import json
import sys

import pytest
import torch
from command_line import QUICK, recipe_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import random_lora

from iteris_core import Calibration, Concept, IterisError, Lora, write_lora
from iteris_core.edit.resize import resize_lora
from iteris_core.edit.target import Target
from iteris_core.errors import LoraFileError
from iteris_core.lora_files.own_names import read_by_own_names
from iteris_core.passes.changes import changes_of

SHORT = Calibration(samples=3, timesteps=1, latents="noise", latent_size=4)


def decaying(host, seed=1, rank=8) -> Lora:
    """A LoRA whose singular values fall, another way in every site."""
    lora = random_lora(host, seed, rank)
    for index, change in enumerate(lora.sites.values()):
        change.up.mul_(torch.linspace(1, 0.02 * (1 + index % 9), rank) ** (1 + index % 3))
    return lora


def test_without_a_base_the_largest_singular_values_of_all_layers_stay(host):
    lora = decaying(host)
    found = resize_lora(lora, Target(rank=3))
    every = [
        (float(s**2 / change.dense().double().norm()) / sum(change.shape), site, number)
        for site, change in lora.sites.items()
        for number, s in enumerate(torch.linalg.svdvals(change.dense().double()))
    ]
    budget = sum(3 * sum(change.shape) for change in lora.sites.values())
    for value, site, number in sorted(every, reverse=True)[: len(lora.sites)]:
        assert number < found.ranks[site], value
    used = sum(rank * sum(lora.sites[site].shape) for site, rank in found.ranks.items())
    assert 0.95 * budget < used <= budget
    assert len(set(found.ranks.values())) > 1
    for site, change in found.lora.sites.items():
        u, s, v = torch.linalg.svd(lora.sites[site].dense().double())
        rank = found.ranks[site]
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert torch.allclose(change.dense().double(), best, atol=1e-5)


def denoised(pipeline, lora: Lora | None, host) -> torch.Tensor:
    """What the UNet gives on fixed inputs of the text encoder and noise."""
    generator = torch.Generator().manual_seed(3)
    changes = changes_of([Concept(lora, trigger="x")]) if lora is not None else {}
    weights = {}
    for site, change in changes.items():
        module = host.sites()[site]
        weights[site] = module.weight.data.clone()
        module.weight.data += change[0].dense().reshape(module.weight.shape)
    with torch.no_grad():
        words = pipeline.tokenizer(["s1 dog"] * 4, return_tensors="pt").input_ids
        states = pipeline.text_encoder(words).last_hidden_state
        noise = torch.randn(4, 4, 8, 8, generator=generator)
        output = pipeline.unet(noise, torch.tensor([100, 300, 600, 900]), states).sample
    for site, weight in weights.items():
        host.sites()[site].weight.data = weight
    return output


def test_a_base_makes_it_better_and_stays_as_it_is(pipeline, host):
    lora = decaying(host)
    before = {k: v.clone() for k, v in pipeline.unet.state_dict().items()}
    concept = Concept(lora, trigger="s1", class_word="dog", strength=0.3)
    by_base = resize_lora(concept, Target(rank=2), host, calibration=SHORT)
    assert all(torch.equal(v, before[k]) for k, v in pipeline.unet.state_dict().items())
    assert not any(module._forward_hooks for module in host.sites().values())
    whole = denoised(pipeline, lora, host)
    plain = Lora({
        site: resize_lora(Lora({site: change}), Target(rank=2)).lora.sites[site]
        for site, change in lora.sites.items()
    })  # fmt: skip
    errors = [
        float((denoised(pipeline, one, host) - whole).norm()) for one in (by_base.lora, plain)
    ]
    assert errors[0] < 0.7 * errors[1], errors
    size = sum(rank * sum(lora.sites[s].shape) for s, rank in by_base.ranks.items())
    assert size <= sum(2 * sum(change.shape) for change in lora.sites.values())


def test_a_lora_that_nothing_calls_for_runs_on_captions(host):
    found = resize_lora(decaying(host), Target(energy=0.9), host, calibration=SHORT)
    assert 0.9 <= found.kept < 0.99


def test_a_target_that_keeps_everything_changes_nothing(host):
    lora = decaying(host)
    concept = Concept(lora, trigger="s1", class_word="dog")
    found = resize_lora(concept, Target(rank=8), host, calibration=SHORT)
    for site, change in found.lora.sites.items():
        assert torch.allclose(change.dense(), lora.sites[site].dense(), atol=1e-4)


@pytest.mark.parametrize("values", [{}, {"rank": 0}, {"energy": 1.0}, {"rank": 2, "energy": 0.5}])
def test_a_target_out_of_range_is_refused(values):
    with pytest.raises(IterisError):
        Target(**values)


def test_a_size_in_which_nothing_fits_is_refused(host):
    with pytest.raises(IterisError, match="too small for a single component"):
        resize_lora(decaying(host), Target(megabytes=1e-6))


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_files_keep_their_names_and_load_in_diffusers(layout, pipeline, host, tmp_path):
    source = tmp_path / "one.safetensors"
    lora = decaying(host)
    base = host.read_lora(write_lora(lora, tmp_path / "any.safetensors")).base
    metadata = {"modelspec.trigger_phrase": "s1 dog", "sshs_model_hash": "stale"}
    write_lora(Lora(lora.sites, "one", metadata, base=base), source, layout=layout)
    read, own = read_by_own_names(source)
    assert own == layout
    small = resize_lora(read, Target(rank=2)).lora
    path = write_lora(small, tmp_path / "small.safetensors", layout=layout)
    assert load_file(path).keys() <= load_file(source).keys()
    with safe_open(path, "pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "s1 dog"
        assert "sshs_model_hash" not in file.metadata()
    wanted = host.read_lora(path).sites
    pipeline.load_lora_weights(str(path))
    for site, change in wanted.items():
        component, _, name = site.partition(".")
        model = getattr(pipeline, component)  # transformers 5 took text_model out of the names
        layer = model.get_submodule(name.removeprefix("text_model."))
        (adapter,) = layer.lora_A
        scale = layer.scaling[adapter]
        product = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight * scale
        assert torch.allclose(product, change.dense(), atol=2e-3), site
    uneven = {change.rank for change in wanted.values()}
    assert len(uneven) > 1


def test_the_command(world, tmp_path, iteris):
    one = world / "lora1.safetensors"
    out = iteris("resize", one, "-o", tmp_path / "a.safetensors", "--rank", 2, "--json")
    told = json.loads(out)
    assert told["megabytes"][1] < 0.75 * told["megabytes"][0]  # names take much of so small a file
    megabytes = one.stat().st_size * 0.6 / 1e6
    iteris("resize", one, "-o", tmp_path / "c.safetensors", "--size", megabytes)
    size = (tmp_path / "c.safetensors").stat().st_size / 1e6
    assert 0.6 * megabytes < size <= megabytes
    out = iteris(
        "resize", f"{one}:s1:dog", "-o", tmp_path / "b.safetensors",
        "--base", world / "base", "--energy", 0.8, *QUICK, "--latent-size=4",
    )  # fmt: skip
    assert "of its effect on their outputs kept" in out


@pytest.mark.parametrize("target", [Target(rank=2), Target(energy=0.9), Target(megabytes=1)])
@pytest.mark.parametrize("by_base", [True, False])
def test_a_lora_of_zeros_is_refused(host, target, by_base):
    lora = random_lora(host, 1)
    zero = Lora({site: change.scaled(0.0) for site, change in lora.sites.items()}, "nothing")
    for changes in (zero, Lora({}, "nothing")):
        with pytest.raises(LoraFileError, match="nothing changes nothing: all of it is zero"):
            resize_lora(changes, target, host if by_base else None, calibration=SHORT)


def test_the_recipe_of_a_merge_says_that_it_was_cut(world, tmp_path, iteris, host):
    lora, out = random_lora(host, 1), tmp_path / "out.safetensors"
    recipe = {"iteris": json.dumps({"method": "iteris", "strength": 0.5})}
    lora = Lora(lora.sites, "merged", recipe, base=lora.base)
    resized = resize_lora(lora, Target(energy=0.5)).lora
    of_lora = json.loads(resized.metadata["iteris"])
    assert of_lora == {"method": "iteris", "strength": 0.5, "cut": {"energy": 0.5}}
    file = write_lora(lora, tmp_path / "merged.safetensors")
    iteris("resize", f"{file},layers=*attn2*", "--rank=2", "-o", out)
    assert recipe_of(out)["cut"] == {"rank": 2, "layers": "*attn2*"}


def test_a_part_of_a_lora_counts_or_is_refused(world, tmp_path, iteris):
    one, two = (world / f"lora{number}.safetensors" for number in (1, 2))
    out = tmp_path / "out.safetensors"
    whole = {key.rpartition(".lora_")[0] for key in load_file(one) if ".lora_" in key}
    for words in ((), (f"--base={world / 'base'}", *QUICK, "--latent-size=4")):
        iteris("resize", f"{one}:s1:dog,layers=*attn2*", "--rank=2", "-o", out, "--overwrite",
               *words)  # fmt: skip
        names = {key.rpartition(".lora_")[0] for key in load_file(out) if ".lora_" in key}
        assert names == {name for name in whole if "attn2" in name}
    out = tmp_path / "none.safetensors"
    resize = ["resize", "-o", out, "--rank=2"]
    for given, why in (
        (f"{one}+{two}", "Two experts need their base: pass --base, or resize each file"),
        (f"{one}:s1:dog,blocks=INS", "blocks= needs a base to run: pass --base"),
        (f"{one}:s1:dog,prompts={world / 'lines.txt'}", "prompts= needs a base to run"),
        (f"{one}:s1:dog:0.5", "strength does not count in iteris resize"),
        (f"{one},weight=2", "weight does not count in iteris resize"),
    ):
        (world / "lines.txt").write_text("a dog")
        assert why in iteris.refused(*resize, given)
    experts = iteris.refused(*resize, f"{one}+{two}", f"--base={world / 'base'}")
    assert "the base has one denoiser; give one file per concept" in experts
    assert not out.exists()


def test_an_embedding_that_cannot_be_written_is_refused_before_a_base_is_loaded(
    world, tmp_path, iteris, monkeypatch
):
    one = world / "lora1.safetensors"
    save_file({"emb_params": torch.ones(1, 8)}, world / "lora1_emb.safetensors")
    monkeypatch.setattr(sys.modules["iteris_core.cli.resize"], "load_base", pytest.fail)
    (tmp_path / "out_emb.safetensors").mkdir()
    resize = ["resize", one, "--rank=2", "--base", world / "base", "--overwrite"]
    told = iteris.refused(*resize, "-o", tmp_path / "out.safetensors")
    assert "out_emb.safetensors is a folder" in told


def test_what_only_a_base_can_read_is_refused_at_once(world, tmp_path, iteris):
    tensors = {
        "lora_unet_x.hada_w1_a": torch.ones(4, 2), "lora_unet_x.hada_w1_b": torch.ones(2, 4),
        "lora_unet_x.hada_w2_a": torch.ones(4, 2), "lora_unet_x.hada_w2_b": torch.ones(2, 4),
    }  # fmt: skip
    save_file(tensors, tmp_path / "loha.safetensors")
    err = iteris.refused("resize", tmp_path / "loha.safetensors", "-o",
                       tmp_path / "out.safetensors", "--rank", 2)  # fmt: skip
    assert "give its base (--base; for merge, BASE)" in err


def test_the_name_of_the_network_stays_without_a_base(world, tmp_path, iteris):
    own, out = tmp_path / "own.safetensors", tmp_path / "out.safetensors"
    save_file(load_file(world / "lora1.safetensors"), own, {"ss_network_module": "networks.lora_x"})
    iteris("resize", own, "--rank=2", "-o", out)
    with safe_open(out, "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora_x"
