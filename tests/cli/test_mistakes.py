"""A user's mistake on the command line or in Python gives one clear line, before any work."""

import logging
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
import torch
from mistakes import CASES, arguments_of, contents, filled, make_mess
from safetensors.torch import load_file, save_file
from tiny import make_pipeline, random_lora

from iteris_core import (
    Calibration,
    Concept,
    IterisError,
    Lora,
    LowRank,
    SettingsError,
    cli,
    merge_loras,
    write_lora,
)
from iteris_core import __main__ as program
from iteris_core.architectures import Architecture
from iteris_core.cli.inputs import check_embeddings, read_lines
from iteris_core.cli.merge_file import parse_concept
from iteris_core.errors import ConceptError, OutOfMemory
from iteris_core.hosts import diffusers_arguments
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.lora_files import BaseModel
from iteris_core.prepare import prepare
from iteris_core.score import ClipScorer


def test_a_blank_before_a_key_does_not_make_it_a_part_of_the_class():
    option = parse_concept("a.safetensors:sks:star, weight=2")
    assert (option.class_word, option.weight) == ("star", 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": "a sks star"}, r"sks: prompts: .* a list of .* such as \['a sks star'\]"),
        ({"subjects": "sks star"}, "sks: subjects: Input should be a list of strings"),
        ({"strength": "1"}, "sks: strength: Input should be a valid number, not '1'"),
        ({"weight": None}, "sks: weight: Input should be a valid number, not None"),
        ({"lora": "cat.safetensors"}, r"host.read_lora\('cat.safetensors'\)"),
    ],
)
def test_a_concept_of_the_wrong_types_is_refused(values, message):
    with pytest.raises(IterisError, match=message):
        Concept(**{"lora": Lora({}), "trigger": "sks", **values})


def merge(world, out, *extra, words="s1:dog"):
    one = f"--concept={world}/lora1.safetensors:{words}"
    return ["merge", world / "base", "-o", out, "--device=cpu", one, *extra]


@pytest.mark.parametrize("data", [
    "\ufeffa cat\nÄ\n".encode(), "a cat\nÄ\n".encode("utf-16"), "a cat\r\n\r\nÄ".encode(),
])  # fmt: skip
def test_lines_are_read_without_marks_of_their_encoding(tmp_path, data):
    (tmp_path / "lines.txt").write_bytes(data)
    assert read_lines(tmp_path / "lines.txt") == ["a cat", "Ä"]


def test_a_base_that_may_be_on_the_hub_is_said_not_to_be_here(world, tmp_path, iteris, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = merge(world, tmp_path / "out.safetensors")
    arguments[1] = "owner/none"
    assert "There is no folder or file of that name here" in iteris.refused(*arguments)


def huge(world, folder):
    """The first LoRA with values that float16 does not hold."""
    tensors = load_file(world / "lora1.safetensors")
    large = {k: t.float() * 1e6 if "lora_up" in k else t.float() for k, t in tensors.items()}
    key = next(key for key in large if "lora_up" in key)
    large[key][0, 0] = 1e15
    save_file(large, folder / "huge.safetensors")
    return folder / "huge.safetensors"


def test_a_merge_too_large_for_half_precision_is_written_as_float32(
    world, tmp_path, iteris, caplog
):
    out, file = tmp_path / "out.safetensors", huge(world, tmp_path)
    extra = [f"--concept={file}:s2:cat", "--method=sum"]
    text = iteris(*merge(world, out, *extra))
    assert "Written as float32, not float16" in caplog.text
    assert f"Wrote {out}" in text
    assert {t.dtype for t in load_file(out).values()} == {torch.float32}
    with pytest.raises(IterisError, match="too large for float16; write float32"):
        write_lora(DiffusersHost(make_pipeline()).read_lora(out), tmp_path / "half.safetensors")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            ["--concept={lora2}:s1:cat"],
            "{lora2}: 's1' is the trigger of one concept and part of 's1 cat'",
        ),
        (
            ["--concept={lora2},trigger=s2,prompts={lines}"],
            "None of the 2 prompts of {lora2} contains",
        ),
    ],
)
def test_what_is_probably_not_meant_is_said_before_the_merge(
    world, tmp_path, iteris, monkeypatch, extra, message
):
    def stop(*_, **__):
        raise IterisError("stop here")

    monkeypatch.setattr(sys.modules["iteris_core.cli.merge"], "load_base", stop)
    (tmp_path / "lines.txt").write_text("a house\na cat\n")
    names = {
        "lora1": world / "lora1.safetensors", "lora2": world / "lora2.safetensors",
        "lines": tmp_path / "lines.txt",
    }  # fmt: skip
    more = [text.format(**names) for text in extra]
    err = iteris.refused(*merge(world, tmp_path / "out.safetensors", *more))
    assert "stop here" in err
    assert message.format(**names) in err
    # What is preserved has a name of its own, which its prompts need not contain.
    preserve = f"--concept=prompts={names['lines']}"
    err = iteris.refused(*merge(world, tmp_path / "out.safetensors", preserve))
    assert "stop here" in err
    assert "None of" not in err


def test_a_file_is_no_host_and_a_lora_no_concept():
    pipeline = make_pipeline()
    lora = random_lora(DiffusersHost(pipeline), 1)
    with pytest.raises(IterisError, match="str does not run a base model; pass a diffusers"):
        merge_loras("base", [Concept(lora, trigger="a")])
    with pytest.raises(IterisError, match="list of Concept, not of Lora"):
        merge_loras(pipeline, [lora])
    with pytest.raises(IterisError, match="Pipeline reads no LoRA; pass Concept"):
        Concept.from_file(pipeline, "a.safetensors")
    with pytest.raises(IterisError, match="'iteris' runs the base model; pass a host"):
        merge_loras(None, ["a.safetensors"])


def test_memory_that_runs_out_in_the_first_prompt_is_named(monkeypatch):
    host = DiffusersHost(make_pipeline())

    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4 TB")

    monkeypatch.setattr(host._loop, "first_call", full)
    concepts = [Concept(random_lora(host, 1), trigger="a")]
    with pytest.raises(OutOfMemory, match=r"ran its first prompt .* Lower latent"):
        merge_loras(host, concepts)


def test_the_inner_probe_does_not_warn_of_a_long_prompt(monkeypatch):
    """Every merge on the toybox warned of indexing errors, for a prompt that is not the user's."""
    loggers, seen = [logging.getLogger(name) for name in ("transformers", "diffusers")], []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.WARNING)
        monkeypatch.setattr(logger, "handlers", [handler])
        logger.manager._clear_cache()
    host = DiffusersHost(make_pipeline())
    calibration = {"samples": 1, "timesteps": 1, "latents": "noise", "contexts": 0.0}
    merge_loras(host, [Concept(random_lora(host, 1), trigger="a")], calibration=calibration)
    assert not [line for line in seen if "Token indices" in line or "truncated" in line]
    host.pipeline.tokenizer.deprecation_warnings.clear()
    host.pipeline.tokenizer("a" * 99)
    assert "Token indices" in "".join(seen)  # of other prompts it still warns


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cat.safetensors", r"must be a list, not 'cat.safetensors'; put it in brackets"),
        (Path("cat.safetensors"), r"must be a list, not 'cat.safetensors'"),
        (Concept(Lora({}), trigger="sks"), r"must be a list, not a single Concept"),
    ],
)
def test_a_single_concept_is_not_a_list(given, message):
    with pytest.raises(IterisError, match=message):
        merge_loras(None, given, "sum")


@pytest.mark.parametrize(("given", "counts"), [(5e6, 5_000_000), (numpy.int64(7), 7), (None, None)])
def test_a_memory_budget_is_any_number_of_bytes(given, counts):
    """A float, or a number of NumPy, was taken for what is free."""
    lora = Lora({"unet.a": LowRank(torch.ones(2, 1), torch.ones(1, 2))})
    with prepare(None, [Concept(lora)], "sum", memory_budget=given) as prepared:
        assert prepared.job.memory_budget == counts
        assert type(prepared.job.memory_budget) is type(counts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory_budget": "half"}, "memory_budget must be bytes, \"free\" or None, not 'half'"),
        ({"memory_budget": -1}, "memory_budget must be bytes"),
        ({"memory_budget": True}, "memory_budget must be bytes"),
        ({"memory_budget": float("nan")}, "memory_budget must be bytes"),
        (
            {"unmergeable": "refused"},
            "unmergeable must be one of refuse, skip, mean, not 'refused'",
        ),
        ({"calibration": {"seed": 2**64}}, "seed must be in"),
    ],
)
def test_an_argument_that_would_be_misread_is_refused(given, message):
    lora = Lora({"unet.a": LowRank(torch.ones(2, 1), torch.ones(1, 2))})
    with pytest.raises(SettingsError, match=message):
        merge_loras(None, [Concept(lora)], "sum", **given)


def test_texts_may_come_from_an_iterator():
    concept = Concept(Lora({}), prompts=iter(["a", "b"]), subjects=(text for text in "cd"))
    assert (concept.prompts, concept.subjects) == (["a", "b"], ["c", "d"])
    assert Calibration(templates=map(str, ["a {}"])).templates == ("a {}",)


def test_a_lora_that_stays_outside_is_no_merge():
    lora = Lora({"unet.a": LowRank(torch.ones(2, 1), torch.ones(1, 2))}, "lcm")
    with pytest.raises(ConceptError, match="nothing to merge: lcm is only loaded beside"):
        merge_loras(None, [Concept(lora, always_on="outside")], "sum")


def test_factors_in_half_precision_are_merged_in_float32():
    change = LowRank(torch.full((2, 1), 1.01).bfloat16(), torch.ones(1, 2).bfloat16())
    loras = [
        Lora({"unet.a": change}),
        Lora({"unet.a": LowRank(torch.ones(2, 1), torch.ones(1, 2))}),
    ]
    for method in ("sum", "average"):
        merged = merge_loras(None, [Concept(lora) for lora in loras], method).lora.sites["unet.a"]
        assert (merged.up.dtype, merged.down.dtype) == (torch.float32, torch.float32)


MISSING = """
import sys
sys.modules[{name!r}] = None
sys.argv = ["iteris", *{arguments!r}]
from iteris_core.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [("torch", "torch is not installed; install it with: pip install 'iteris-lora[cli]'"),
     ("typer", "typer is not installed")],
)  # fmt: skip
def test_without_its_extra_the_command_says_how_to_get_it(name, message):
    script = MISSING.format(name=name, arguments=["merge", "--help"])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == f"iteris: {message}" or message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stop_while_it_loads_is_one_line(monkeypatch, capsys):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("iteris_core.cli.main", stop)
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "iteris: cancelled; nothing was written.\n"


def test_two_merges_in_threads_leave_logging_as_it_was(monkeypatch):
    """Each kept the level that the other had set for its trials."""
    inside, entered, done = threading.Event(), threading.Event(), threading.Event()

    def slow(*_):
        if not inside.is_set():
            inside.set()
            entered.wait(0.5)  # the other comes in, if nothing stops it
        else:
            entered.set()
            done.wait(0.5)

    monkeypatch.setattr(diffusers_arguments, "_study", slow)
    one, two = (threading.Thread(target=diffusers_arguments.study, args=[None] * 2) for _ in "ab")
    one.start()
    inside.wait()
    two.start()
    one.join()
    done.set()
    two.join()
    assert logging.root.manager.disable == 0


def test_every_name_of_the_package_is_there():
    import iteris_core

    assert set(iteris_core.__all__) <= set(dir(iteris_core))
    assert all(getattr(iteris_core, name) is not None for name in iteris_core.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Merger'"):
        iteris_core.Merger  # noqa: B018


def test_a_repr_is_one_line_and_a_dtype_is_torchs_too(world, tmp_path):
    host = DiffusersHost(make_pipeline())
    concept = Concept.from_file(host, world / "lora1.safetensors", trigger="a", strength=0.5)
    assert (concept.name, concept.strength) == ("a", 0.5)
    assert len(repr(concept)) < 400
    result = merge_loras(None, [concept], "average")
    path = result.save(tmp_path / "out.safetensors", dtype=torch.bfloat16)
    up = next(tensor for key, tensor in load_file(path).items() if "lora_up" in key)
    assert up.dtype == torch.bfloat16
    # What the merge noted calls for its concept.
    assert Concept.from_file(host, path).trigger == "a"
    with pytest.raises(IterisError, match=r"dtype must be one of .*, not 'int8'"):
        result.save(tmp_path / "int.safetensors", dtype=torch.int8)


@pytest.fixture(scope="module")
def mess(tmp_path_factory):
    return make_mess(tmp_path_factory.mktemp("mess"))


@pytest.fixture
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in ("merge", "base"):
        command = sys.modules[f"iteris_core.cli.{module}"]
        monkeypatch.setattr(command, "load_base", lambda *_, **__: pytest.fail("a base was loaded"))
    monkeypatch.setattr(ClipScorer, "load", pytest.fail)


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(("case", "message"), CASES, ids=[case for case, _ in CASES])
def test_a_mistake_is_one_line_and_nothing_is_lost(
    mess, tmp_path, monkeypatch, capsys, case, message
):
    monkeypatch.chdir(tmp_path)
    arguments = arguments_of(case, mess, tmp_path)
    kept = contents(Path(mess["tmp"]), Path(mess["world"]), tmp_path)
    monkeypatch.setattr(sys, "argv", ["iteris", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("iteris: ")
    assert re.search(r" \[IT-\d\d\]\n$", err)
    assert filled(message, mess) in err
    assert len(err) < 1500
    assert contents(Path(mess["tmp"]), Path(mess["world"]), tmp_path) == kept


def test_the_embedding_of_two_experts_has_its_place_before_the_merge(tmp_path):
    """It goes beside the file for high noise, not beside a file that is never written."""
    sites = dict.fromkeys(("net.a", "net_2.a"), LowRank(torch.ones(2, 1), torch.ones(1, 2)))
    base = BaseModel(Architecture("x", "X", denoiser="net"), {}, {}, {})
    lora = Lora(sites, base=base, embeddings={"<toy>": {"clip_l": torch.ones(1, 2)}})
    out = tmp_path / "out.safetensors"
    check_embeddings([Concept(lora, trigger="a")], out, None, overwrite=False)
    (tmp_path / "out_high_noise_emb.safetensors").write_text("mine")
    with pytest.raises(IterisError, match="out_high_noise_emb"):
        check_embeddings([Concept(lora, trigger="a")], out, None, overwrite=False)
