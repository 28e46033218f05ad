"""The transformers host: encoders, decoders, both, and vision, with adapters as peft saves them."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from iteris_core import Calibration, Concept, IterisError, Lora, LowRank, merge_loras
from iteris_core.hosts.peft_folder import read_heads, write_adapter
from iteris_core.hosts.transformers import TransformersHost

CALIBRATION = Calibration(samples=5)


def make_bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=32, num_labels=4,
    )  # fmt: skip
    return BertForSequenceClassification(config), ["query", "value", "dense"]


def make_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=60, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), ["q", "k", "v", "wo"]


def make_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"]


def make_gpt2():
    """Its linears are Conv1D: weights stored transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), ["c_attn", "c_fc"]


def make_blip():
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = {
        "vocab_size": 60, "hidden_size": 32, "encoder_hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1, "sep_token_id": 1,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=32)
    return BlipForConditionalGeneration(config), ["qkv", "query", "value"]


MAKERS = {
    "encoder": make_bert,
    "both": make_t5,
    "decoder": make_llama,
    "transposed": make_gpt2,
    "vision": make_blip,
}


def make_batches(kind: str, seed: int):
    """Three rows of unequal length in two batches."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows, length in ((2, 7), (3, 5)):
        ids = torch.randint(3, 60, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length - 2 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if kind == "both":
            batch["decoder_input_ids"] = torch.randint(3, 60, (rows, 4), generator=generator)
            batch["decoder_attention_mask"] = torch.ones(rows, 4, dtype=torch.long)
        if kind == "vision":
            batch["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=generator)
        batches.append(batch)
    return batches


@pytest.fixture(params=list(MAKERS))
def world(request, tmp_path):
    """(kind, host in float64, two adapter folders)"""
    torch.manual_seed(0)
    model, targets = MAKERS[request.param]()
    model = model.double().eval()
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, lora_alpha=3, target_modules=targets)
        tuned = get_peft_model(copy.deepcopy(model), config)
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.data = torch.randn_like(parameter) * 0.3
        tuned.save_pretrained(tmp_path / f"adapter{seed}")
        folders.append(tmp_path / f"adapter{seed}")
    return request.param, TransformersHost(model), folders


def concepts_of(kind, host, folders):
    return [
        Concept(host.read_lora(folder), trigger=f"t{i}", inputs=make_batches(kind, i))
        for i, folder in enumerate(folders)
    ]


def largest_gap(ours, theirs):
    assert set(ours.sites) == set(theirs.sites)
    return max(
        float((ours.sites[s].dense() - c.dense()).norm() / c.dense().norm())
        for s, c in theirs.sites.items()
    )


def add_to_weights(model, lora):
    for site, change in lora.sites.items():
        module = model.get_submodule(site.removeprefix("model."))
        dense = change.dense().double()
        transposed = type(module).__name__ == "Conv1D"
        module.weight.data += (dense.mT if transposed else dense).reshape(module.weight.shape)


def logits(model, batch):
    with torch.no_grad():
        found = model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    return found.logits


def test_adapters_are_read_as_peft_applies_them(world):
    kind, host, folders = world
    batch = make_batches(kind, 9)[1]
    lora = host.read_lora(folders[0])
    plain = copy.deepcopy(host.model)
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(host.model), folders[0]), batch)
    add_to_weights(plain, lora)
    ours = logits(plain, batch)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    assert float((ours - logits(host.model, batch)).norm() / theirs.norm()) > 1e-3


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_sweep_is_the_converged_iteration_and_the_base_is_untouched(world, align):
    kind, host, folders = world
    concepts = concepts_of(kind, host, folders)
    before = {name: value.clone() for name, value in host.model.state_dict().items()}
    settings = {"align": align, "statistics": "float64", "ridge": 1e-4}
    sweep = merge_loras(
        host, concepts, settings={**settings, "micro_batch": 2}, calibration=CALIBRATION
    )
    iterated = merge_loras(
        host,
        concepts,
        settings={**settings, "schedule": "jacobi", "iterations": 20},
        calibration=CALIBRATION,
    )
    assert largest_gap(sweep.lora, iterated.lora) < 1e-9
    for name, value in host.model.state_dict().items():
        assert torch.equal(value, before[name])
    alone = merge_loras(host, concepts[:1], settings=settings, calibration=CALIBRATION)
    assert largest_gap(alone.lora, concepts[0].lora) < 1e-5  # factors are float32


def test_padding_counts_for_nothing(world):
    """The same samples with more padding, and other tokens under it, give the same merge."""
    kind, host, folders = world
    if kind in ("decoder", "transposed"):
        pytest.skip("a causal model has no tokens that see the padding behind them")
    settings = {"statistics": "float64", "micro_batch": 5}

    def padded(batch):
        ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
        ids[mask == 0] = 7
        pad = torch.full((len(ids), 3), 9)
        return {
            **batch,
            "input_ids": torch.cat([ids, pad], dim=1),
            "attention_mask": torch.cat([mask, torch.zeros_like(pad)], dim=1),
        }

    loras = [host.read_lora(folder) for folder in folders]
    results = [
        merge_loras(
            host,
            [
                Concept(lora, inputs=[change(b) for b in make_batches(kind, i)])
                for i, lora in enumerate(loras)
            ],
            settings=settings,
            calibration=CALIBRATION,
        ).lora
        for change in (dict, padded)
    ]
    assert largest_gap(*results) < 1e-6


def test_a_written_adapter_loads_with_peft(world, tmp_path):
    kind, host, folders = world
    result = merge_loras(host, concepts_of(kind, host, folders), calibration=CALIBRATION)
    folder = write_adapter(result.lora, tmp_path / "merged")
    read = host.read_lora(folder)
    assert largest_gap(read, result.lora) < 1e-6
    batch = make_batches(kind, 9)[1]
    theirs = logits(PeftModel.from_pretrained(copy.deepcopy(host.model), folder), batch)
    plain = copy.deepcopy(host.model)
    add_to_weights(plain, result.lora)
    ours = logits(plain, batch)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    with pytest.raises(IterisError, match="exists already"):
        write_adapter(result.lora, folder)


def tuned_folder(model, targets, folder, seed, **options):
    """An adapter of random factors, saved by peft."""
    torch.manual_seed(seed)
    tuned = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=targets, **options))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    tuned.save_pretrained(folder)
    return folder


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
    from iteris_core.collector import Collector
    from iteris_core.methods import Task
    from iteris_core.methods.passes import Batching, reference_pass

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
        site: [concept.lora.sites[site] for concept in concepts] for site in concepts[0].lora.sites
    }
    task = Task(host, concepts, references, CALIBRATION, torch.Generator(), lambda *_: None)
    collector = Collector(references, full=True)
    reference_pass(task, collector, Batching(8))
    moments = {site: collector.take(site) for site in collector.sites}
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
            own = found.shared.concepts[index]
            assert own.tokens == len(x), site
            assert float((own.own - x.mT @ x).norm() / own.own.norm()) < 1e-4, site
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
    from transformers import FalconConfig, FalconForCausalLM, Gemma2Config, Gemma2ForCausalLM

    sandwich = Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    parallel = FalconConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    for model in (Gemma2ForCausalLM(sandwich), FalconForCausalLM(parallel)):
        host = TransformersHost(model)
        assert host.streams(set(host.sites())) == {}


def test_repair_brings_the_output_nearer(world):
    """The final output of the merged model, against each LoRA's own, on the samples."""
    kind, host, folders = world
    concepts = concepts_of(kind, host, folders)
    errors = []
    for repair in (False, True):
        result = merge_loras(
            host, concepts, settings={"repair": repair, "ridge": 1e-8}, calibration=CALIBRATION
        )
        merged = copy.deepcopy(host.model)
        add_to_weights(merged, result.lora)
        total = 0.0
        for i, concept in enumerate(concepts):
            own = copy.deepcopy(host.model)
            add_to_weights(own, concept.lora)
            for batch in make_batches(kind, i):
                gap = logits(merged, batch) - logits(own, batch)
                counts = batch["attention_mask"].bool()
                total += float((gap[counts] if gap.shape[:2] == counts.shape else gap).norm() ** 2)
        errors.append(total)
        # The encoder's LoRAs change every site that adds to a stream already.
        added = repair and kind != "encoder"
        assert any(r.repair for r in result.report.sites.values()) == added
    assert errors[1] < 0.7 * errors[0]


def test_labels_mark_padding_of_the_decoder():
    """labels of -100 and their decoder's tokens, written out with a mask, are the same samples."""
    from transformers import T5ForConditionalGeneration

    model, _ = make_t5()
    host = TransformersHost(model.double().eval())
    labels = torch.tensor([[5, 6, 1, -100, -100], [7, 8, 9, 10, 1]])
    shifted = T5ForConditionalGeneration.prepare_decoder_input_ids_from_labels(model, labels)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    changes = {}
    site = "model.decoder.block.0.layer.0.SelfAttention.q"
    generator = torch.Generator().manual_seed(0)
    for i in range(2):
        up, down = (
            torch.randn(32, 2, generator=generator),
            torch.randn(2, 32, generator=generator),
        )
        changes[i] = Lora({site: LowRank(up, down)}, str(i))
    results = []
    for batch in (
        {"input_ids": ids, "labels": labels},
        {
            "input_ids": ids,
            "decoder_input_ids": shifted,
            "decoder_attention_mask": (labels != -100).long(),
        },
    ):
        concepts = [Concept(changes[i], inputs=[batch]) for i in range(2)]
        results.append(merge_loras(host, concepts, settings={"repair": False}).lora)
    assert largest_gap(*results) < 1e-9
    unmasked = [
        Concept(changes[i], inputs=[{"input_ids": ids, "decoder_input_ids": shifted}])
        for i in range(2)
    ]
    assert (
        largest_gap(merge_loras(host, unmasked, settings={"repair": False}).lora, results[0]) > 1e-6
    )


def test_heads_are_kept_apart(tmp_path):
    model, targets = make_bert()
    host = TransformersHost(model.eval())
    folders = []
    for seed in (1, 2):
        folders.append(
            tuned_folder(
                model, targets, tmp_path / f"a{seed}", seed, modules_to_save=["classifier"]
            )
        )
    heads = read_heads(folders[0])
    assert set(heads) == {"classifier.weight", "classifier.bias"}
    concepts = [Concept(host.read_lora(f), inputs=make_batches("encoder", 1)) for f in folders]
    result = merge_loras(host, concepts, settings={"repair": False}, calibration=CALIBRATION)
    assert not any("classifier" in site for site in result.lora.sites)
    heads["classifier.bias"] = heads["classifier.bias"] + 1
    folder = write_adapter(result.lora, tmp_path / "merged", heads=heads)
    batch = make_batches("encoder", 9)[0]
    plain = copy.deepcopy(model)
    plain.load_state_dict(heads, strict=False)
    for site, change in result.lora.sites.items():
        plain.get_submodule(site.removeprefix("model.")).weight.data += change.dense()
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, theirs, atol=1e-4, rtol=1e-4)
    assert read_heads(folder).keys() == heads.keys()


def test_bad_adapters_and_inputs_are_errors(tmp_path):
    model, targets = make_bert()
    host = TransformersHost(model)
    with pytest.raises(IterisError, match="no adapter folder"):
        host.read_lora(tmp_path)
    get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=targets)).save_pretrained(
        tmp_path / "a"
    )
    lora = host.read_lora(tmp_path / "a")
    with pytest.raises(IterisError, match="has no inputs"):
        merge_loras(host, [Concept(lora)])
    with pytest.raises(IterisError, match="inputs are empty"):
        merge_loras(host, [Concept(lora, inputs=[])])
    with pytest.raises(IterisError, match="not tensors"):
        merge_loras(host, [Concept(lora, inputs=[{"input_ids": [[1, 2]]}])])
    other, _ = make_llama()
    with pytest.raises(IterisError, match="another base model"):
        TransformersHost(other).read_lora(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config["peft_type"] = "IA3"
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(IterisError, match="IA3"):
        host.read_lora(tmp_path / "a")
