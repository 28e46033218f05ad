"""The command line: a merge from files to a file, and one clear line for any bad input."""

import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import typer
from command_line import QUICK, recipe_of
from safetensors.torch import load_file, save_file
from tiny import make_pipeline, random_lora

import toybox
from iteris_core import Lora, LowRank, cli, merge_loras, write_lora
from iteris_core.cli.merge_file import parse_concept
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.lora_files import read_lora_file, released_base

pytestmark = pytest.mark.usefixtures("unmeasured")

COMMANDS = typer.main.get_command(cli.app).commands


def merge_arguments(world, *files, out, extra=()):
    concepts = [f"--concept={file}:s{i}:dog" for i, file in enumerate(files)]
    quick = ["--samples=3", "--timesteps=1", "--latents=noise", "--device=cpu"]
    return ["merge", str(world / "base"), *concepts, "-o", str(out), *quick, *extra]


def test_a_merge_from_files_to_a_file(world, tmp_path, iteris):
    files = [world / "lora1.safetensors", world / "lora2.safetensors"]
    out = tmp_path / "merged.safetensors"
    text = iteris(*merge_arguments(world, *files, out=out))
    assert "Merged 2 concepts with iteris" in text
    assert str(out) in text
    host = DiffusersHost(make_pipeline())
    sites = set(random_lora(host, 1).sites)
    repairs = set(host.streams(sites)) - sites
    assert repairs
    assert f"{len(sites)} sites and {len(repairs)} that repair drift" in text
    assert len(load_file(out)) == 3 * len(sites | repairs)


@pytest.mark.parametrize("where", ["merge_metadata", "with_run", "write_card"])
def test_ctrl_c_once_a_merge_is_finished(world, tmp_path, iteris, monkeypatch, where):
    """The first one means: write what there is. So a second one comes soon."""
    module = sys.modules[
        "iteris_core.merge" if where == "merge_metadata" else "iteris_core.cli.merge"
    ]
    call = getattr(module, where)

    def pressed(*given):
        signal.raise_signal(signal.SIGINT)
        return call(*given)

    monkeypatch.setattr(module, where, pressed)
    out = tmp_path / "merged.safetensors"
    files = [world / "lora1.safetensors", world / "lora2.safetensors"]
    text = iteris(*merge_arguments(world, *files, out=out), "--card", "--latent-size=4")
    assert f"Wrote {out}" in text
    assert load_file(out)
    assert out.with_suffix(".md").is_file()


def test_bare_files_are_refused_before_a_base_is_loaded(world, tmp_path, iteris, monkeypatch):
    bare = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    for seed, file in enumerate(bare):
        write_lora(random_lora(DiffusersHost(make_pipeline()), seed), file)
    files = [f"--concept={file}" for file in bare]
    monkeypatch.setattr(sys.modules["iteris_core.cli.merge"], "load_base", None)
    told = iteris.refused("merge", world / "base", *files, "-o", tmp_path / "merged.safetensors")
    assert (
        f"There is nothing to merge: {bare[0]} and {bare[1]} have no trigger words, so they would "
        "only be added up, as when all are loaded. Give each its words: on IterIS LoRAs in ComfyUI"
    ) in told


def test_the_quick_start_runs_on_the_loras_that_ship(tmp_path, iteris, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toybox").mkdir()  # the base's name never means a folder
    (tmp_path / "loras").mkdir()
    for name in ("sks1", "sks10"):
        shutil.copy(toybox.concepts()[name].lora, tmp_path / "loras")
    files = [f"--concept=loras/{name}.safetensors" for name in ("sks1", "sks10")]
    merge = ("merge", "toybox", *files, *QUICK, "-o", "merged.safetensors")
    assert "Nothing was merged or written" in iteris(*merge, "--plan")
    iteris(*merge)
    recipe = recipe_of("merged.safetensors")
    assert recipe["base"] == "toybox"
    words = [(one["trigger"], one["class"]) for one in recipe["concepts"]]
    assert words == [("sks1", "star"), ("sks10", "cross")]
    iteris("merge", "--from", "merged.safetensors", "--loras", "loras", "-o", "again.safetensors")
    assert "sks1 star, sks10 cross" in iteris("inspect", "merged.safetensors")


def test_a_method_on_weights_needs_no_base(tmp_path, iteris):
    base, out = released_base("sd1"), tmp_path / "out.safetensors"
    site = next(site for site in base.shapes if site.endswith("attn2.to_q"))
    files = []
    for factor in (1.0, 3.0):
        ones = LowRank(torch.full((320, 1), factor), torch.ones(1, 320))
        lora = Lora({site: ones}, metadata={"modelspec.trigger_phrase": f"s{factor:g}"}, base=base)
        files.append(write_lora(lora, tmp_path / f"lora{factor:g}.safetensors"))
    concepts = [f"--concept={file}" for file in files]
    ask = ["merge", "--method=average", *concepts, "-o"]
    for arguments in (
        [*ask, str(out)],
        ["merge", "--from", str(out), "-o", str(tmp_path / "again.safetensors")],
    ):
        iteris(*arguments)
    merged = [read_lora_file(path, base) for path in tmp_path.glob("[ao]*.safetensors")]
    merged.append(merge_loras(None, files, "average").lora)
    assert len(merged) == 3
    for lora in merged:
        torch.testing.assert_close(lora.sites[site].dense(), torch.full((320, 320), 2.0))
    err = iteris.refused(*ask, str(out), "--overwrite", "--offload=model")
    assert "--offload is for merges on a base; name it before the LoRAs" in err


KEY = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight"
BASELESS = {f"transformer.h.0.attn.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {k.replace("mid_block", "mid_block_9"): v for k, v in t.items()},
            "another base",
        ),
        (lambda t: BASELESS, "another base model"),
        (
            lambda t: {**t, KEY: torch.ones(4, 768)},
            "down (4, 768)",
        ),
    ],
    ids=["names", "no common site", "shapes"],
)
def test_a_file_of_another_base_is_one_line_and_nothing_is_written(
    world, tmp_path, iteris, change, message
):
    bad, out = tmp_path / "bad.safetensors", tmp_path / "out.safetensors"
    tensors = change(load_file(world / "lora1.safetensors"))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, bad)
    files = [world / "lora1.safetensors", bad]
    line = iteris.refused(*merge_arguments(world, *files, out=out)).partition("iteris: ")[2]
    assert message in line
    assert str(bad) in line
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.safetensors"}


def test_windows_paths_and_strengths():
    assert (
        str(parse_concept(r"C:\loras\cat.safetensors:sks:cat").file) == r"C:\loras\cat.safetensors"
    )
    option = parse_concept("a/cat.safetensors:sks:cat:0.5")
    assert (option.trigger, option.class_word, option.strength) == ("sks", "cat", 0.5)
    assert option.text_strength is None
    assert parse_concept("a/cat.safetensors:sks:cat:0.8/0.5").text_strength == 0.5
    assert parse_concept("cat.safetensors:sks:").class_word == ""
    option = parse_concept("a.safetensors+b.safetensors:0.5/0")
    assert (option.files, option.trigger) == ([Path("a.safetensors"), Path("b.safetensors")], "")
    assert (option.strength, option.text_strength) == (0.5, 0)


def test_presets_and_what_preserve_prompts_weigh(world, tmp_path, iteris):
    files = [world / "lora1.safetensors", world / "lora2.safetensors"]
    kept = tmp_path / "kept.txt"
    kept.write_text("a cat\n")
    out = tmp_path / "out.safetensors"
    extra = ["--json", "--preset=paper", "--set=iterations=2", f"--concept=prompts={kept}"]
    text = iteris(*merge_arguments(world, *files, out=out, extra=extra))
    report = json.loads(text)
    assert report["settings"]["weighting"] == "adapter"
    assert report["settings"]["iterations"] == 2
    assert report["calibration"]["samples"] == 3
    assert report["calibration"]["empty_share"] == 0
    assert report["converged"] is False
    assert [concept["weight"] for concept in recipe_of(out)["concepts"]] == [1.0, 1.0, 0.2]


def test_the_examples_of_the_help_are_command_lines(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "merge.yaml").write_text("base: x\n")
    shown = set()
    for command in COMMANDS.values():
        text = (command.help or "").replace("\\\n", " ")
        for line in re.findall("^iteris .+$", text, re.MULTILINE):
            _, name, *arguments = shlex.split(line)
            assert COMMANDS[name].make_context(name, arguments).params
            shown.add(name)
    assert COMMANDS.keys() - shown == {"methods", "demo"}


@pytest.mark.parametrize("mode", ["rich", None])
@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_fits_a_terminal_and_hides_nothing(iteris, monkeypatch, command, mode):
    """In panels, or as plain text for a pipe: no line is cut or wider than 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(cli.app, "rich_markup_mode", mode)
    text = iteris(command, "-h")
    lines = text.splitlines()
    assert len(lines) < (145 if mode is None else 195)
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    for parameter in COMMANDS[command].params:
        assert parameter.help, parameter.name
        assert all(option in text for option in parameter.opts if option.startswith("--"))


def test_the_version_and_one_method_in_full(iteris):
    assert iteris("--version").startswith("iteris ")
    text = iteris("methods", "iteris")
    for word in ("weighting", "eq. 8", "jacobi"):
        assert word in text
