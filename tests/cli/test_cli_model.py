"""``iteris merge`` on transformers models, from folders to a folder."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from command_line import run
from language_bases import make_bert, make_t5, tuned_folder
from peft import PeftModel
from safetensors.torch import save_file
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from iteris_core.hosts.transformers import TransformersHost

_VOCABULARY = "[PAD] [END] [UNK] joy fear a of the is this day night good bad"
WORDS = _VOCABULARY.split()
TRAINED = {make_bert: (["query", "value"], "SEQ_CLS"), make_t5: (["q", "v"], "SEQ_2_SEQ_LM")}


def make_world(make, folder):
    """A base, two adapters and two text files."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    (model, _), (targets, task) = make(), TRAINED[make]
    model.eval().save_pretrained(folder / "base")
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder / "base")
    for seed in (1, 2):
        tuned_folder(model, targets, folder / f"a{seed}", seed, task_type=task)
        lines = ["this is a good day", "the night of fear", "joy", "bad day"][seed - 1 :]
        (folder / f"t{seed}.txt").write_text("\n\n".join(lines))
    return folder


def arguments(world, out, *extra, samples=("t1.txt", "t2.txt")):
    concepts = [f"--concept={world}/a{i}:{world / s}" for i, s in enumerate(samples, 1)]
    return "merge", str(world / "base"), *concepts, "-o", str(out), "--device=cpu", *extra


def test_texts_to_an_adapter_folder(tmp_path, monkeypatch, capsys):
    world = make_world(make_bert, tmp_path)
    out = tmp_path / "merged"
    code, text, _ = run(monkeypatch, capsys, *arguments(world, out, "--dtype=float32", "--json"))
    assert code == 0
    report = json.loads(text)
    assert report["concepts"] == ["a1", "a2"]
    assert report["rows"] == 7
    base = AutoModelForSequenceClassification.from_pretrained(world / "base")
    merged = PeftModel.from_pretrained(copy.deepcopy(base), out).eval()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert not torch.equal(merged(input_ids=ids).logits, base.eval()(input_ids=ids).logits)
    lora = TransformersHost(base).read_lora(out)
    assert {site for site, found in report["sites"].items()} == set(lora.sites)
    code, _, error = run(monkeypatch, capsys, *arguments(world, out))
    assert code == 2
    assert "exists already" in error


def test_features_while_generating_and_inputs_from_tensors(tmp_path, monkeypatch, capsys):
    world = make_world(make_t5, tmp_path)
    for name, extra in (("generated", ["--generate=3"]), ("tensors", [])):
        samples = ("t1.txt", "t2.txt")
        if name == "tensors":
            samples = ("x.safetensors",) * 2
            ids = torch.randint(3, len(WORDS), (4, 5))
            save_file(
                {"input_ids": ids, "decoder_input_ids": ids.clone()}, tmp_path / "x.safetensors"
            )
        out = tmp_path / name
        given = arguments(world, out, *extra, "--set=objective=adapter", samples=samples)
        code, text, error = run(monkeypatch, capsys, *given)
        assert code == 0, error
        assert "Merged 2 concepts with iteris" in text
        base = AutoModelForSeq2SeqLM.from_pretrained(world / "base")
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "base"
        assert len(TransformersHost(base).read_lora(out).sites) == 12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: [f"--concept={w}/base:{w}/t1.txt"], "not a peft adapter folder"),
        (lambda w: ["--model-class=X", f"--concept={w}/a1:{w}/t1.txt"], "no class of that name"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, change, message):
    world = make_world(make_bert, tmp_path)
    out = tmp_path / "merged"
    given = ["merge", str(world / "base"), *change(world), "-o", str(out), "--device=cpu"]
    code, _, error = run(monkeypatch, capsys, *given)
    assert code == 2
    assert message in error
    assert not out.exists()


def test_a_class_of_ones_own_is_named_with_the_option(tmp_path, monkeypatch, capsys):
    world = make_world(make_bert, tmp_path)
    for seed in (1, 2):
        file = world / f"a{seed}" / "adapter_config.json"
        config = json.loads(file.read_text()) | {"task_type": None}
        config["auto_mapping"] = {"base_model_class": "Mine", "parent_library": "__main__"}
        file.write_text(json.dumps(config))
    given = arguments(world, tmp_path / "merged")
    code, _, error = run(monkeypatch, capsys, *given)
    assert code == 2
    assert "is for Mine; transformers has no class of that name" in error
    code, text, error = run(
        monkeypatch, capsys, *given, "--model-class=AutoModelForSequenceClassification"
    )
    assert code == 0, error
    assert "Merged 2" in text
