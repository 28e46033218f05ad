"""The diffusers host on a real pipeline: rows, files and what the library makes of them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import is_attention, random_lora

from iteris_core import Calibration, Concept, IterisError, Lora, LowRank, merge_loras, write_lora
from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.hosts.diffusers import DiffusersHost

PROMPTS = ["a dog", "a red dog on a table", "two dogs in the rain", "s1 dog", "dog and cat"]


def difference(ours: Lora, theirs: Lora) -> float:
    assert set(ours.sites) == set(theirs.sites)
    return max(
        float((ours.sites[s].dense() - c.dense()).norm() / c.dense().norm())
        for s, c in theirs.sites.items()
    )


def with_lora(pipeline, lora: Lora):
    """A copy of the pipeline with the changes added to its weights."""
    pipeline = copy.deepcopy(pipeline)
    sites = DiffusersHost(pipeline).sites()
    for site, change in lora.sites.items():
        weight = sites[site].weight
        weight.data += change.dense().reshape(weight.shape).to(weight)
    return pipeline


def outputs(pipeline, prompts=PROMPTS, seed=0):
    """(text embeddings, denoiser outputs) of a plain run."""
    generator = torch.Generator().manual_seed(seed)
    dtype = pipeline.unet.dtype
    latents = torch.randn(len(prompts), 4, 8, 8, generator=generator).to(dtype)
    timesteps = torch.linspace(1, 900, len(prompts)).long()
    with torch.no_grad():
        text = pipeline.encode_prompt(prompts, "cpu", 1, False)[0]
        return text, pipeline.unet(latents, timesteps, text).sample


def merged_concepts(host, **kwargs):
    return [
        Concept(random_lora(host, seed, **kwargs), prompts=PROMPTS, trigger=f"s{seed}")
        for seed in (1, 2)
    ]


CALIBRATION = Calibration(samples=6, timesteps=2, denoising_steps=4, seed=3)


def everything(site: str) -> bool:
    """Attention, feed-forward, time embedding and 3x3 convolutions."""
    return is_attention(site) or ".conv1" in site or ".ff." in site or "time_emb" in site


@pytest.mark.parametrize("select", [is_attention, everything], ids=["attention", "all"])
def test_lockstep_rows_are_separate_runs(host, select):
    loras = [random_lora(host, seed, select=select) for seed in (1, 2, 3)]
    sites = list(loras[0].sites)
    references = {site: [lora.sites[site] for lora in loras[:2]] for site in sites}
    owners = [0, 0, 1, 1, 1]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(5, 4, 8, 8, generator=generator)
    timesteps = torch.linspace(1, 900, 5).long()
    found = []

    def run():
        text = host.pipeline.encode_prompt(PROMPTS * 2, "cpu", 1, False)[0]
        found.extend(
            [text, host.pipeline.unet(latents.repeat(2, 1, 1, 1), timesteps.repeat(2), text).sample]
        )

    with Lockstep(host.sites(), references) as lockstep:
        lockstep.merged = dict(loras[2].sites)
        lockstep.run(MicroBatch(run, owners, 2))
    for rows, lora in (([0, 1], 0), ([2, 3, 4], 1), ([5, 6, 7, 8, 9], 2)):
        wanted = outputs(with_lora(host.pipeline, loras[lora]))
        for ours, theirs in zip(found, wanted, strict=True):
            plain = theirs[[row % 5 for row in rows]]
            assert float((ours[rows] - plain).norm() / plain.norm()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_sweep_is_the_converged_iteration_in_both_precisions(host, host64, objective):
    calibration = replace(CALIBRATION, conditions=0.0)  # iterations have plain rows
    for each, limit, precision in ((host, 1e-5, "float32"), (host64, 1e-9, "float64")):
        concepts = merged_concepts(each)
        settings = {"objective": objective, "precision": precision, "micro_batch": 5, "ridge": 1e-4}
        settings["bound"] = 0.0
        sweep = merge_loras(each, concepts, settings=settings, calibration=calibration)
        iterated = merge_loras(
            each,
            concepts,
            settings={**settings, "schedule": "jacobi", "iterations": 30},
            calibration=calibration,
        )
        assert difference(sweep.lora, iterated.lora) < limit


def test_all_kinds_of_sites_merge(host64):
    concepts = merged_concepts(host64, select=everything)
    sweep = merge_loras(
        host64, concepts, settings={"precision": "float64"}, calibration=CALIBRATION
    )
    assert any(c.kernel == (3, 3) for c in sweep.lora.sites.values())
    alone = merge_loras(
        host64, concepts[:1], settings={"precision": "float64"}, calibration=CALIBRATION
    )
    assert difference(alone.lora, concepts[0].lora) < 1e-7


def test_one_denoising_step_is_enough(host64):
    calibration = Calibration(samples=3, timesteps=1, denoising_steps=1, seed=3)
    concepts = merged_concepts(host64)
    settings = {"precision": "float64"}
    alone = merge_loras(host64, concepts[:1], settings=settings, calibration=calibration)
    assert difference(alone.lora, concepts[0].lora) < 1e-7


@pytest.mark.parametrize("latents", ["denoising", "noise"])
def test_micro_batches_and_seeds(host64, latents):
    concepts = merged_concepts(host64)
    first, second, other = (
        merge_loras(
            host64,
            concepts,
            settings={"precision": "float64", "micro_batch": size},
            calibration=Calibration(
                samples=5, timesteps=2, denoising_steps=3, latents=latents, seed=seed, guidance=2.0
            ),
        )
        for size, seed in ((100, 3), (3, 3), (3, 4))
    )
    assert difference(first.lora, second.lora) < 1e-9
    assert difference(first.lora, other.lora) > 1e-4
    assert first.report.rows == 2 * 5 * 2 + 4  # of generic prompts


def test_the_global_random_state_is_left_alone(host):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    merge_loras(host, merged_concepts(host), calibration=CALIBRATION)
    assert torch.equal(before, torch.get_rng_state())


def count_unet_runs(host):
    runs = []
    handle = host.pipeline.unet.conv_in.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs, handle


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_text_only_sites_need_no_pass_of_the_denoiser(host64, objective):
    def text_only(site):
        return is_attention(site) and (
            site.startswith("text_encoder") or "attn2.to_k" in site or "attn2.to_v" in site
        )

    concepts = merged_concepts(host64, select=text_only)
    runs, handle = count_unet_runs(host64)
    settings = {"precision": "float64", "objective": objective, "repair": False}
    # Every prompt once and none empty, so that both ways weigh the prompts alike.
    none = dict.fromkeys(("empty_share", "contexts", "generic", "conditions"), 0.0)
    calibration = Calibration(samples=5, timesteps=2, denoising_steps=4, **none)
    quick = merge_loras(host64, concepts, settings=settings, calibration=calibration)
    handle.remove()
    assert runs == []
    assert any(site.startswith("unet.") for site in quick.lora.sites)
    host64._direct = set()  # make it take the long way
    slow = merge_loras(host64, concepts, settings=settings, calibration=calibration)
    assert difference(quick.lora, slow.lora) < 1e-9


def test_text_encoder_alone_needs_no_denoiser_at_all(host):
    concepts = merged_concepts(host, select=lambda s: is_attention(s) and s.startswith("text"))
    runs, handle = count_unet_runs(host)
    result = merge_loras(host, concepts, calibration=CALIBRATION)
    handle.remove()
    assert runs == []
    assert all(site.startswith("text_encoder.") for site in result.lora.sites)


def test_unequal_ranks_and_one_sided_sites_round_trip(host, tmp_path):
    one = random_lora(host, 1, rank=2, select=lambda s: is_attention(s) and "attn2" not in s)
    two = random_lora(host, 2, rank=5)
    concepts = [Concept(lora, prompts=PROMPTS) for lora in (one, two)]
    result = merge_loras(host, concepts, calibration=CALIBRATION)
    assert result.lora.ranks == {5, 7}
    for layout in ("kohya", "peft"):
        path = result.save(tmp_path / f"{layout}.safetensors", layout=layout, dtype="float32")
        assert difference(host.read_lora(path), result.lora) < 1e-6


SCRIPT = """
import sys, torch
sys.path[:0] = {tests!r}
from tiny import make_pipeline
from test_diffusers_host import outputs
from safetensors.torch import save_file
pipeline = make_pipeline()
pipeline.load_lora_weights({path!r})
text, noise = outputs(pipeline)
save_file({{"text": text.contiguous(), "noise": noise.contiguous()}}, {out!r})
"""


@pytest.mark.parametrize("layout", ["kohya", pytest.param("peft", marks=pytest.mark.slow)])
def test_a_merged_file_loads_in_a_new_process_with_equal_outputs(host, tmp_path, layout, request):
    concepts = [
        Concept(random_lora(host, 1, rank=2), prompts=PROMPTS),
        Concept(
            random_lora(host, 2, rank=4, select=lambda s: everything(s) and "to_k" not in s),
            prompts=PROMPTS,
        ),
    ]
    result = merge_loras(host, concepts, calibration=CALIBRATION)
    path = result.save(tmp_path / "merged.safetensors", layout=layout, dtype="float32")
    out = tmp_path / "outputs.safetensors"
    tests = [str(folder) for folder in request.path.parents[:2]]
    script = SCRIPT.format(tests=tests, path=str(path), out=str(out))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    found = load_file(out)
    text, noise = outputs(with_lora(host.pipeline, result.lora))
    base_text, base_noise = outputs(host.pipeline)
    for ours, wanted, base in (
        (found["text"], text, base_text),
        (found["noise"], noise, base_noise),
    ):
        assert float((ours - wanted).norm() / wanted.norm()) < 1e-5
        assert float((wanted - base).norm() / wanted.norm()) > 1e-2


def test_alpha_in_every_place_where_it_may_stand(host, tmp_path):
    lora = random_lora(host, 1, rank=4, select=lambda s: "attn1.to_q" in s)
    site, change = next(iter(lora.sites.items()))
    kohya = "lora_unet_" + site.removeprefix("unet.").replace(".", "_")
    up, down = change.up, change.down
    peft = {f"{site}.lora_A.weight": down, f"{site}.lora_B.weight": up}
    old = {
        site.replace(".to_q", ".processor.to_q") + "_lora.down.weight": down,
        site.replace(".to_q", ".processor.to_q") + "_lora.up.weight": up,
    }

    def config(**values):
        flat = {f"unet.{name}": value for name, value in values.items()}
        return {"lora_adapter_metadata": json.dumps(flat)}

    plain = {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
    base = {"r": 4, "target_modules": ["to_q"]}
    for index, (tensors, metadata, scale) in enumerate(
        [
            (plain, {}, 1.0),  # no alpha: alpha = rank
            ({**plain, f"{kohya}.alpha": torch.tensor(2.0)}, {}, 0.5),
            (peft, {}, 1.0),
            (old, {}, 1.0),
            (peft, config(lora_alpha=16, **base), 4.0),
            (peft, config(lora_alpha=16, use_rslora=True, **base), 8.0),
            (peft, config(lora_alpha=16, alpha_pattern={"attn1.to_q": 1}, **base), 0.25),
        ]
    ):
        path = tmp_path / f"{index}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
        found = host.read_lora(path)
        assert list(found.sites) == [site]
        assert difference(found, Lora({site: change.scaled(scale)})) < 1e-6


def test_what_diffusers_saves_is_read_with_its_alpha(host, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    pipeline = copy.deepcopy(host.pipeline)
    unet_config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_out.0"])
    text_config = LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj", "out_proj"])
    inject_adapter_in_model(unet_config, pipeline.unet)
    inject_adapter_in_model(text_config, pipeline.text_encoder)
    generator = torch.Generator().manual_seed(0)
    for model in (pipeline.unet, pipeline.text_encoder):
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    pipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
        unet_lora_adapter_metadata=unet_config.to_dict(),
        text_encoder_lora_adapter_metadata=text_config.to_dict(),
    )
    lora = host.read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    ours, theirs = outputs(with_lora(host.pipeline, lora)), outputs(pipeline)
    base = outputs(host.pipeline)
    for a, b, c in zip(ours, theirs, base, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5
        assert float((b - c).norm() / b.norm()) > 1e-3


def test_files_are_never_overwritten_by_accident(host, tmp_path):
    lora = random_lora(host, 1)
    path = write_lora(lora, tmp_path / "a.safetensors")
    before = path.read_bytes()
    with pytest.raises(IterisError, match="exists already"):
        write_lora(lora, path)
    assert path.read_bytes() == before
    write_lora(lora, path, overwrite=True, dtype="float32")
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_values_that_do_not_fit_the_dtype_are_an_error_with_the_site(tmp_path):
    site = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = Lora({site: LowRank(torch.full((4, 1), 1e12), torch.ones(1, 4))})
    with pytest.raises(IterisError, match=f"Site {site}.*write float32"):
        write_lora(lora, tmp_path / "a.safetensors", dtype="float16")
    assert list(tmp_path.iterdir()) == []
    write_lora(lora, tmp_path / "a.safetensors", dtype="bfloat16")


def test_a_pipeline_without_a_text_encoder_is_an_error(pipeline):
    pipeline.text_encoder = None
    with pytest.raises(IterisError, match="has no text_encoder"):
        DiffusersHost(pipeline)


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_a_rank_by_share_of_energy(host64, objective):
    settings = {"objective": objective, "precision": "float64"}
    concepts = merged_concepts(host64)
    exact = merge_loras(host64, concepts, settings=settings, calibration=CALIBRATION)
    cut = merge_loras(host64, concepts, settings={**settings, "rank": 0.9}, calibration=CALIBRATION)
    assert max(cut.lora.ranks) < max(exact.lora.ranks)
    assert all(site.truncated <= 0.1 + 1e-6 for site in cut.report.sites.values()) or (
        objective == "output"  # where Σ r_i itself cuts something off
    )
