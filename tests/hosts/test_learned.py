"""Learned embeddings: which words refer to them, and that they are active during a merge."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from bases import make_sdxl
from safetensors.torch import save_file
from tiny import make_pipeline, random_lora

from iteris_core import Calibration, Concept, Lora, merge_loras, write_lora
from iteris_core.concepts import words_in
from iteris_core.errors import LoraFileError
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.learned import embedding_triggers, in_force
from iteris_core.lora_files.embeddings import bundled
from iteris_core.lora_files.metadata import noted_phrases
from iteris_core.lora_files.tensors import read_tensors

QUICK = Calibration(samples=3, timesteps=1, denoising_steps=2)
pytestmark = pytest.mark.usefixtures("unmeasured")


def vectors(seed: int, count: int = 1, width: int = 32) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def concept(embeddings, trigger="", class_word="dog", lora=None, **given) -> Concept:
    lora = replace(lora or Lora({}, "lora"), embeddings=embeddings)
    return Concept(lora, trigger=trigger, class_word=class_word, **given)


ONE = {"toy": {"emb_params": vectors(0)}}
BOTH = {"toy": ONE["toy"], "<cat>": {"emb_params": vectors(1)}}


@pytest.mark.parametrize(
    ("embeddings", "given", "words", "uncalled"),
    [
        (ONE, {"trigger": "toy"}, {"toy"}, []),
        (ONE, {"trigger": "<Toy>"}, {"<toy>"}, []),
        (ONE, {"trigger": "embedding:toy"}, {"embedding:toy"}, []),
        (ONE, {"trigger": "sks"}, set(), ["toy"]),
        (ONE, {"trigger": "embedding:other"}, set(), ["toy"]),
        (ONE, {"trigger": "toys"}, set(), ["toy"]),  # is not its name
        (ONE, {"trigger": "", "prompts": ["a toy-like thing"]}, set(), ["toy"]),
        (ONE, {"trigger": "sks", "class_word": "toy"}, set(), ["toy"]),  # a kind of thing
        (ONE, {"trigger": "sks", "prompts": ["a dog"]}, set(), ["toy"]),
        (ONE, {"trigger": "", "prompts": ["a toy, (toy:1.2)"]}, {"toy"}, []),
        (ONE, {"trigger": "", "prompts": ["a <toy> toy"]}, {"<toy>"}, []),
        (BOTH, {"trigger": "", "subjects": ["toy dog", "<cat> cat"]}, {"toy", "<cat>"}, []),
        (BOTH, {"trigger": "toy"}, {"toy"}, ["<cat>"]),
        (BOTH, {"trigger": "sks"}, set(), ["toy", "<cat>"]),
        (BOTH | {"<>": ONE["toy"]}, {"trigger": "toy <cat>"}, {"toy", "<cat>"}, ["<>"]),
        (BOTH | {"  ": ONE["toy"]}, {"trigger": "toy  <cat>"}, {"toy", "<cat>"}, ["  "]),
    ],
)
def test_what_calls_for_an_embedding(embeddings, given, words, uncalled):
    calls = embedding_triggers(concept(embeddings, **given))
    assert set(calls.words) == words
    warnings = calls.warnings(set(calls.words.values()))
    assert len(warnings) == len(uncalled)
    assert all(f"{n} is not active" in "".join(warnings) for n in uncalled)


def encoded(pipeline, *prompts):
    with torch.no_grad():
        return pipeline.encode_prompt(
            prompt=list(prompts),
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )[0]


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_is_as_it_was(pipeline, fails):
    tokenizer, config = pipeline.tokenizer, dict(pipeline.config)
    size, weight = len(tokenizer), pipeline.text_encoder.get_input_embeddings().weight
    before = weight.clone()
    try:
        with in_force(pipeline, [embedding_triggers(concept(ONE, trigger="toy"))]) as placeholders:
            assert pipeline.tokenizer is not tokenizer
            encoded(pipeline, placeholders(0, "a toy"))
            if fails:
                raise RuntimeError
    except RuntimeError:
        assert fails
    assert pipeline.tokenizer is tokenizer
    assert dict(pipeline.config) == config
    assert len(tokenizer) == size
    assert torch.equal(weight, before)
    modules = list(pipeline.text_encoder.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


def test_each_text_encoder_has_its_own_vectors():
    """Those for which a file has none read the word as it stands there, as when it is loaded."""
    pipeline = make_sdxl()
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    tables = [encoder.get_input_embeddings().weight for encoder in encoders]
    parts = {
        name: vectors(seed, 2, table.shape[1])
        for seed, (name, table) in enumerate(zip(("clip_l", "clip_g"), tables, strict=True))
    }
    both = in_force_on(pipeline, {"e": parts})
    first = in_force_on(pipeline, {"e": {"clip_l": parts["clip_l"]}})
    plain = encoded(pipeline, "a <e> dog")
    width = tables[0].shape[1]
    # By hand: two letters that the prompt does not have get the vectors.
    ids = pipeline.tokenizer("q z").input_ids[1:3]
    with torch.no_grad():
        for table, vector in zip(tables, parts.values(), strict=True):
            table[ids] = vector
    wanted = encoded(pipeline, "a q z dog")
    assert torch.equal(both, wanted)
    assert torch.equal(first[..., :width], wanted[..., :width])
    assert torch.equal(first[..., width:], plain[..., width:])


def in_force_on(pipeline, embeddings):
    with in_force(
        pipeline, [embedding_triggers(concept(embeddings, trigger="<e>"))]
    ) as placeholders:
        return encoded(pipeline, placeholders(0, "a <e> dog"))


def small(site: str) -> bool:
    return ("mid_block" in site and "to_" in site) or ".layers.0.self_attn" in site


def test_a_merge_has_them_in_force(pipeline):
    """Bit by bit what it is on a pipeline into which they were loaded by hand."""
    host = DiffusersHost(pipeline)
    loras = [random_lora(host, seed, select=small) for seed in (1, 2)]
    own = [vectors(1), vectors(2)]
    taught = [
        concept({f"<e{i}>": {"emb_params": own[i]}}, f"<e{i}>", "dog", loras[i]) for i in (0, 1)
    ]
    found = merge_loras(host, taught, calibration=QUICK)
    hand = copy.deepcopy(pipeline)
    for i in (0, 1):
        hand.load_textual_inversion({f"<e{i}>": own[i]}, token=f"<e{i}>")
    plain = [Concept(loras[i], trigger=f"<e{i}>", class_word="dog") for i in (0, 1)]
    wanted = merge_loras(DiffusersHost(hand), plain, calibration=QUICK).lora
    others = merge_loras(host, plain, calibration=QUICK).lora
    for site, change in wanted.sites.items():
        assert torch.equal(found.lora.sites[site].dense(), change.dense())
    assert any(not torch.equal(others.sites[s].dense(), c.dense()) for s, c in wanted.sites.items())
    assert "its embedding <e0> is active" in found.report.summary()


def test_an_embedding_for_another_base_is_said_aloud(pipeline, caplog):
    host = DiffusersHost(pipeline)
    lora = random_lora(host, 1, select=small)
    odd = concept({"e": {"clip_g": vectors(0, 1, 1280)}}, "<e>", "dog", lora)
    report = merge_loras(host, [odd], calibration=QUICK).report
    assert "e is not active" in report.summary()
    assert "no text encoder of the base takes {'clip_g': 1280}" in caplog.text


def test_a_merged_file_is_read_back_and_merged_again(pipeline, tmp_path):
    """Two of one name are two in the merged file, whose phrases call for them by their new names;
    with a third all three are in force."""
    host = DiffusersHost(pipeline)
    loras = [replace(random_lora(host, seed, select=small), name=f"l{seed}") for seed in (1, 2, 3)]
    parts = [{"clip_l": vectors(seed, 2)} for seed in (1, 2, 3)]
    first = [concept({"toy": parts[i]}, "<toy>", ("dog", "cat")[i], loras[i]) for i in (0, 1)]
    merged = merge_loras(None, first, "sum")
    path = merged.save(tmp_path / "m.safetensors", dtype="float32")
    again = host.read_lora(path)
    assert {name: list(of) for name, of in again.embeddings.items()} == {
        "toy": ["clip_l"], "l2-toy": ["clip_l"],
    }  # fmt: skip
    assert torch.equal(again.embeddings["l2-toy"]["clip_l"], parts[1]["clip_l"])
    words = words_in(noted_phrases(again.metadata))
    assert words["subjects"] == ("toy dog", "l2-toy cat")
    third = concept({"bird": parts[2]}, "bird", "", loras[2])
    result = merge_loras(host, [Concept(again, **words), third], calibration=QUICK)
    assert list(result.lora.embeddings) == ["toy", "l2-toy", "bird"]
    assert "not active" not in result.report.summary()
    for word in ("toy", "l2-toy", "bird"):
        assert f"its embedding {word} is active" in result.report.summary()
    (tmp_path / "m_l2-toy_emb.safetensors").unlink()
    moved = host.read_lora(path)
    assert list(moved.embeddings) == ["toy"]
    assert any("l2-toy IS MISSING" in note for note in moved.notes)


def listing(lora: Lora) -> Lora:
    """``lora`` with the list of its embeddings, as a merged one has it."""
    return replace(lora, metadata={"iteris": json.dumps({"embeddings": list(lora.embeddings)})})


def test_embeddings_in_every_place(pipeline, tmp_path):
    host = DiffusersHost(pipeline)
    lora = random_lora(host, 1, select=small)
    path = write_lora(lora, tmp_path / "a.safetensors")
    kept = {
        "sks.v2": {"emb_params": vectors(1)},
        "<b>": {"clip_l": vectors(2), "clip_g": vectors(3)},
    }
    save_file(read_tensors(path)[0] | bundled(kept), path)
    beside = {
        "a_emb": {"text_encoders_0": vectors(4, 2)},
        "a_embedding": {"<tok>": vectors(5)[0]},
        "a_b_emb": {"clip_l": vectors(6)},  # of the LoRA a_b
        "a_c_emb": {"clip_l": vectors(7)},  # nobody's
    }
    for name, tensors in beside.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    write_lora(lora, tmp_path / "a_b.safetensors")
    found = host.read_lora(path).embeddings
    assert {name: sorted(parts) for name, parts in found.items()} == {
        "sks.v2": ["emb_params"], "<b>": ["clip_g", "clip_l"], "a": ["clip_l"],
        "<tok>": ["emb_params"],
    }  # fmt: skip
    assert found["<tok>"]["emb_params"].shape == (1, 32)
    assert list(host.read_lora(tmp_path / "a_b.safetensors").embeddings) == ["a_b"]
    # As they are written they are read.
    lora = listing(replace(lora, embeddings=found))
    out = write_lora(lora, tmp_path / "out.safetensors")
    again = host.read_lora(out).embeddings
    assert {n: set(parts) for n, parts in again.items()} == {n: set(p) for n, p in found.items()}
    assert all(torch.equal(again[n][p], v) for n, parts in found.items() for p, v in parts.items())
    fresh = make_pipeline()
    fresh.load_textual_inversion(str(tmp_path / "out_tok_emb.safetensors"))
    assert "<tok>" in fresh.tokenizer.get_added_vocab()
    save_file({"bundle_emb.x.clip_l": torch.ones(1, 2, 3)}, tmp_path / "bad.safetensors")
    with pytest.raises(LoraFileError, match="is not an embedding"):
        host.read_lora(tmp_path / "bad.safetensors")
