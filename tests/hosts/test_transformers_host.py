"""The transformers host: adapters as peft saves them, padding, heads, errors."""

import copy
import json

import pytest
import torch
from language_bases import (
    CALIBRATION,
    MAKERS,
    add_to_weights,
    largest_gap,
    logits,
    make_batches,
    make_bert,
    make_llama,
    make_t5,
    make_world,
    tuned_folder,
)
from peft import LoraConfig, PeftModel, get_peft_model

from iteris_core import Concept, IterisError, Lora, LowRank, merge_loras
from iteris_core.hosts.transformers import TransformersHost
from iteris_core.lora_files.peft_folder import read_heads, write_adapter


@pytest.fixture(params=list(MAKERS))
def world(request, tmp_path):
    return make_world(request.param, tmp_path)


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


@pytest.mark.parametrize("side", ["left", pytest.param("right", marks=pytest.mark.slow)])
def test_padding_counts_for_nothing(world, side):
    """The same samples with more padding, and other tokens under it, give the same merge."""
    kind, host, folders = world
    settings = {"precision": "float64", "micro_batch": 5}

    def padded(batch):
        ids, mask = batch["input_ids"].clone(), batch["attention_mask"]
        ids[mask == 0] = 7
        pad = torch.full((len(ids), 3), 9)
        both = (pad, torch.zeros_like(pad))
        ids, mask = (
            torch.cat([more, own] if side == "left" else [own, more], dim=1)
            for own, more in zip((ids, mask), both, strict=True)
        )
        return {**batch, "input_ids": ids, "attention_mask": mask}

    loras = [host.read_lora(folder) for folder in folders]

    def merge(on, change):
        concepts = [
            Concept(lora, inputs=[change(b) for b in make_batches(kind, i)])
            for i, lora in enumerate(loras)
        ]
        return merge_loras(on, concepts, settings=settings, calibration=CALIBRATION).lora

    assert largest_gap(merge(host, dict), merge(host, padded)) < 1e-6
    if kind != "encoder":
        writing = TransformersHost(host.model, generate={"max_new_tokens": 3, "min_new_tokens": 3})
        assert largest_gap(merge(writing, dict), merge(writing, padded)) < 1e-6


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
        up, down = (torch.randn(*s, generator=generator) for s in ((32, 2), (2, 32)))
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
        folder, saved = tmp_path / f"a{seed}", ["classifier"]
        folders.append(tuned_folder(model, targets, folder, seed, modules_to_save=saved))
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
    with pytest.raises(IterisError, match="exists already"):
        write_adapter(result.lora, folder)


def test_bad_adapters_and_inputs_are_errors(tmp_path):
    model, targets = make_bert()
    host = TransformersHost(model.eval())
    with pytest.raises(IterisError, match="not a peft adapter folder"):
        host.read_lora(tmp_path)
    config = LoraConfig(target_modules=targets, init_lora_weights=False)  # B is not zero
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "a")
    lora = host.read_lora(tmp_path / "a")
    with pytest.raises(IterisError, match="has no inputs"):
        merge_loras(host, [Concept(lora)])
    with pytest.raises(IterisError, match="inputs are empty"):
        merge_loras(host, [Concept(lora, inputs=[])])
    with pytest.raises(IterisError, match="not tensors"):
        merge_loras(host, [Concept(lora, inputs=[{"input_ids": [[1, 2]]}])])
    ids = torch.tensor([[1, 2]])
    uneven = [{"input_ids": ids}, {"input_ids": ids, "token_type_ids": 0 * ids}]
    with pytest.raises(IterisError, match="token_type_ids are not in all"):
        merge_loras(host, [Concept(lora, inputs=uneven)])
    model.train()
    with pytest.raises(IterisError, match="training mode"):
        merge_loras(host, [Concept(lora, inputs=[{"input_ids": ids}])])
    with pytest.raises(IterisError, match="has adapters loaded"):
        TransformersHost(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a"))
    other, _ = make_llama()
    with pytest.raises(IterisError, match="another base model"):
        TransformersHost(other).read_lora(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "is a IA3 adapter"),
        ({"use_dora": True}, "has use_dora = True"),
        ({"alora_invocation_tokens": [3]}, "has alora_invocation_tokens"),
        ({"lora_lattice": {"order": 3}}, "lora_lattice = "),  # of a peft to come
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
    ],
)
def test_adapters_that_are_more_than_two_factors_are_refused(tmp_path, change, message):
    model, targets = make_bert()
    folder = tuned_folder(model, targets, tmp_path / "a", 1)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(IterisError, match=message):
        TransformersHost(model).read_lora(folder)
