"""What the transformers host collects: features of a LoRA that writes, residual streams, repair."""

import copy

import pytest
import torch
from language_bases import (
    CALIBRATION,
    MAKERS,
    add_to_weights,
    concepts_of,
    logits,
    make_batches,
    make_bert,
    make_blip,
    make_gpt2,
    make_llama,
    make_t5,
    make_world,
    tuned_folder,
)
from peft import PeftModel

from iteris_core import Concept, merge_loras
from iteris_core.hosts.transformers import TransformersHost
from iteris_core.lora import SiteChanges


@pytest.fixture(params=list(MAKERS))
def world(request, tmp_path):
    return make_world(request.param, tmp_path)


def linear_inputs(model, batch, sites):
    """Every token that reached the sites, (tokens, in), from a run of peft's own model."""
    found = {site: [] for site in sites}
    handles = [
        model.get_submodule(site).register_forward_pre_hook(
            lambda _, args, site=site: found[site].append(args[0].flatten(0, -2))
        )
        for site in sites
    ]
    with torch.no_grad():
        model.generate(**batch, do_sample=False, num_beams=1, max_new_tokens=4)
    for handle in handles:
        handle.remove()
    return {site: torch.cat(rows) for site, rows in found.items()}


@pytest.mark.parametrize("make", [make_t5, make_llama, make_gpt2, make_blip])
def test_features_are_those_of_each_lora_generating(make, tmp_path):
    """Moments of a plain teacher-forced pass = moments of what peft's model sees as it generates"""
    from iteris_core.passes.batches import REFERENCE, ExecutionConfig
    from iteris_core.passes.job import Job
    from iteris_core.passes.sweep import Passes
    from iteris_core.solve.choose import THRESHOLDS
    from iteris_core.solve.problem import MemoryEstimate, RegressionSpec, Solution, StageSolver

    torch.manual_seed(0)
    model, targets = make()
    host = TransformersHost(model.eval(), generate={"max_new_tokens": 4})
    folders = [tuned_folder(model, targets, tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    batch = {"input_ids": torch.tensor([[2, 6, 7, 1]])}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if make is make_blip:
        batch["pixel_values"] = torch.randn(1, 3, 16, 16)
    kept = {name: value.clone() for name, value in batch.items()}
    concepts = [Concept(host.read_lora(folder), inputs=[batch]) for folder in folders]
    references = {
        site: SiteChanges([concept.lora.sites[site] for concept in concepts])
        for site in concepts[0].lora.sites
    }
    task = Job(host, concepts, references, CALIBRATION, torch.Generator(), lambda *_: None)
    moments = {}

    def keep(site, reduction):
        reduction.inputs.complete()
        moments[site] = reduction
        return Solution(references[site].by_concept[0])

    fit = RegressionSpec([1.0, 1.0], 1e-6)
    solver = StageSolver(
        begin=lambda opening: THRESHOLDS.choose(opening, fit, "output"),
        solve=keep,
        bytes=lambda site, sweep: MemoryEstimate(0, 0),
    )
    with task.run() as run:
        Passes(run, lambda stage: solver, ExecutionConfig(8), REFERENCE).solve()
    assert set(moments) == set(references)
    for index, folder in enumerate(folders):
        theirs = linear_inputs(
            PeftModel.from_pretrained(copy.deepcopy(model), folder).get_base_model(),
            {name: value.clone() for name, value in kept.items()},
            [site.removeprefix("model.") for site in references],
        )
        for site, found in moments.items():
            x = theirs[site.removeprefix("model.")]
            if "EncDecAttention" in site and site[-1] in "kv":
                x = x[:4]  # transformers caches what it reads from the encoder
            own = found.inputs.own[index]
            assert found.inputs.tokens[index] == len(x), site
            assert float((own - x.mT @ x).norm() / own.norm()) < 1e-4, site
    assert all(torch.equal(batch[name], value) for name, value in kept.items())


@pytest.mark.parametrize("make", [make_bert, make_t5, make_llama, make_gpt2, make_blip])
def test_streams_are_what_a_sites_output_is_added_to(make):
    """Some module reads exactly stream + output: the next norm."""
    torch.manual_seed(0)
    model, _ = make()
    host = TransformersHost(model.double().eval())
    sites = set(host.sites())
    streams = host.streams(sites)
    leaves = {site.rpartition(".")[2] for site in streams}
    assert leaves & {"wo", "dense", "down_proj", "c_proj", "fc2"}
    kind = {make_blip: "vision", make_t5: "both"}.get(make, "encoder")
    seen, read, given = [], {}, {}
    handles = []
    for module in model.modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args: (
                    seen.append(args[0].clone())
                    if args and isinstance(args[0], torch.Tensor)
                    else None
                )
            )
        )
    for site, reader in streams.items():
        handles.append(
            reader.register_forward_pre_hook(
                lambda _, args, site=site: read.update({site: args[0].clone()})
            )
        )
        handles.append(
            host.sites()[site].register_forward_hook(
                lambda _, args, out, site=site: given.update({site: out.clone()})
            )
        )
    logits(model, make_batches(kind, 0)[0])
    for handle in handles:
        handle.remove()
    for site in streams:
        total = read[site] + given[site]
        like = [x for x in seen if x.shape == total.shape]
        assert any(torch.allclose(x, total, atol=1e-12, rtol=0) for x in like), site
    part = next(site for site in streams if make is not make_blip or "text" in site)
    head = ".".join(part.split(".")[:2])
    assert all(site.startswith(head) for site in host.streams({part}))


def test_layers_wired_otherwise_have_no_streams():
    from transformers import (
        FalconConfig,
        FalconForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
    )

    sandwich = Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    parallel = FalconConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    scaled = GraniteConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, residual_multiplier=0.2,
    )  # fmt: skip
    models = (Gemma2ForCausalLM(sandwich), FalconForCausalLM(parallel), GraniteForCausalLM(scaled))
    for model in models:
        host = TransformersHost(model)
        assert host.streams(set(host.sites())) == {}


def test_repair_brings_the_output_nearer(world):
    """The final output of the merged model, against each LoRA's own, on the samples."""
    kind, host, folders = world
    concepts = concepts_of(kind, host, folders)
    errors = []
    for repair in (False, True):
        exact = {"repair": repair, "ridge": 1e-8, "shrink": 1.0, "bound": 0.0}
        result = merge_loras(host, concepts, settings=exact, calibration=CALIBRATION)
        errors.append(_error(kind, host, concepts, result.lora))
        # The encoder's LoRAs change every site that adds to a stream already.
        added = repair and kind != "encoder"
        assert any(r.repair for r in result.report.sites.values()) == added
    assert errors[1] < 0.7 * errors[0]


def _error(kind, host, concepts, lora) -> float:
    """Squared distance of the merged model's outputs from those of each LoRA alone."""
    merged = copy.deepcopy(host.model)
    add_to_weights(merged, lora)
    total = 0.0
    for i, concept in enumerate(concepts):
        own = copy.deepcopy(host.model)
        add_to_weights(own, concept.lora)
        for batch in make_batches(kind, i):
            gap = logits(merged, batch) - logits(own, batch)
            counts = batch["attention_mask"].bool()
            total += float((gap[counts] if gap.shape[:2] == counts.shape else gap).norm() ** 2)
    return total
