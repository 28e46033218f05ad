"""Options of merge do what they say."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from command_line import QUICK, recipe_of, same
from PIL import Image
from safetensors.torch import load_file

from iteris_core import cli
from iteris_core.methods.row_gradients import RowGradients


def merge(world, out, *extra):
    concepts = [f"--concept={world}/lora{i}.safetensors:s{i}:dog" for i in (1, 2)]
    return ["merge", world / "base", "-o", out, *QUICK, *concepts, *extra]


CALIBRATION = [
    ("--samples=2", "samples", 2),
    ("--timesteps=2", "timesteps", 2),
    ("--latents=denoising", "latents", "denoising"),
    ("--denoising-steps=3", "denoising_steps", 3),
    ("--guidance=2.5", "guidance", 2.5),
    ("--empty-share=0.5", "empty_share", 0.5),
    ("--contexts=0.25", "contexts", 0.25),
    ("--class-words=0.5", "class_words", 0.5),
    ("--generic=0", "generic", 0.0),
    ("--conditions=0", "conditions", 0.0),
    ("--composites=0.5", "composites", 0.5),
    ("--latent-size=4", "latent_size", 4),
    ("--minutes=600", "minutes", None),  # the recipe has the samples that ran
    ("--minutes=none", "minutes", None),
    ("--contexts=none", "contexts", None),
    ("--seed=7", "seed", 7),
    ("--templates={lines}", "templates", ["a photo of {}", "{} at night"]),
    ("--set=samples=2", "samples", 2),
    ("--preset=fast", "samples", 3),  # --samples counts over it
]


def test_options_of_the_calibration(world, tmp_path, iteris):
    """All at once, and each in the recipe; what one cannot hold beside another comes after it."""
    out = tmp_path / "out.safetensors"
    lines = tmp_path / "lines.txt"
    lines.write_text("a photo of {}\n{} at night\n")
    options = [option.format(lines=lines) for option, *_ in CALIBRATION]
    calibration = json.loads(iteris(*merge(world, out, *options, "--json")))["calibration"]
    assert calibration == {**calibration, **{k: v for _, k, v in CALIBRATION if k != "samples"}}
    assert calibration["samples"] == 2


def test_options_of_the_merge(world, tmp_path, iteris):
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    more = ["--method=regmean", "--set=rank=2", "--layout=peft", "--dtype=float32", "--overwrite",
            "--unmergeable=skip", "--energy=0.9", "--allow-partial",
            "--memory=0.5", "--card"]  # fmt: skip
    text = iteris(*merge(world, out, *more))
    card = out.with_suffix(".md")
    assert f"Wrote {card}." in text.replace("\n", " ").replace("  ", " ")
    assert "- method: `regmean`" in card.read_text()
    tensors = load_file(out)
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert {t.shape[0] for key, t in tensors.items() if "lora_A" in key} == {2}
    recipe = recipe_of(out)
    assert (recipe["method"], recipe["unmergeable"]) == ("regmean", "skip")
    assert recipe["concepts"][0]["reading"] == {"allow_partial": True, "energy": 0.9}


def test_options_of_the_base_reach_what_loads_it(world, tmp_path, iteris, monkeypatch):
    """``--offload`` and ``--device`` need a GPU; that they arrive is what can be seen without."""
    seen = {}

    def load_base(base, device, dtype, offload):
        seen.update(device=device, dtype=dtype, offload=offload)
        raise cli.IterisError("stop here")

    command = sys.modules["iteris_core.cli.merge"]  # the package has its function in its place
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "load_base", load_base)
    options = ["--device=cuda", "--base-dtype=bfloat16", "--offload=sequential"]
    assert "stop here" in iteris.refused(*merge(world, tmp_path / "out.safetensors", *options))
    assert seen == {"device": "cuda", "dtype": "bfloat16", "offload": "sequential"}


def test_a_plan_merges_and_writes_nothing(world, tmp_path, iteris):
    out = tmp_path / "out.safetensors"
    text = iteris(*merge(world, out, "--plan"))
    assert text.count("unet: 7 rows") == 1
    assert text.startswith("s1: s1 dog\ns2: s2 dog\n")
    assert "Whole merge: about" in text
    assert "Nothing was merged or written." in text
    assert "unet" not in iteris.err
    assert "solving sites" not in iteris.err
    found = json.loads(iteris(*merge(world, out, "--plan", "--json")))
    assert found["plan"][-2].startswith("unet: 7 rows")
    assert found["plan"][-1].startswith("steps through the unet: 16 of 16 rows at once")
    assert (found["denoised"], found["seconds"] > 0) == (0, True)
    assert any("name no concept" in note for note in found["notes"])
    assert not list(tmp_path.iterdir())


def test_a_plan_is_refused_where_the_merge_is(world, tmp_path, iteris):
    out = tmp_path / "out.safetensors"
    too_little = merge(world, out, "--memory=0.00001", "--latents=denoising")
    for extra in (["--plan"], []):
        code, text, err = iteris.run(*too_little, *extra)
        assert (code, text) == (2, "")
        assert "needs at least" in err
        assert "denoising steps" not in err
    assert not list(tmp_path.iterdir())


def test_a_quiet_merge_says_nothing_but_errors(world, tmp_path, iteris):
    out = tmp_path / "out.safetensors"
    for extra in (["--plan"], []):
        code, text, err = iteris.run(*merge(world, out, "--quiet", *extra))
        assert (code, text, err) == (0, "", "")
    assert out.is_file()
    left_out = f"--concept={world}/lora1.safetensors:s3:dog:0"  # a warning
    *again, _ = merge(world, out, left_out, "--quiet", "")
    code, text, err = iteris.run(*again)
    assert (code, text) == (2, "")
    assert err.startswith("iteris: ")
    assert "exists already" in err


@pytest.mark.slow
def test_warnings_of_modules_have_the_program_s_form(world, tmp_path):
    """In a process of its own, since the tests have log handlers."""
    out = tmp_path / "out.safetensors"
    little = map(str, merge(world, out, "--memory=0.0015", "--plan"))
    command = [sys.executable, "-m", "iteris_core", *little]
    for extra, said in (([], True), (["--quiet"], False)):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=True)
        err = " ".join(done.stderr.split())
        assert ("Not enough memory for all rows" in err) == said
        assert "WARNING" not in err
        assert "iteris_core." not in err
        assert bool(err) == said


def test_ctrl_c_says_that_nothing_was_written(world, tmp_path, iteris, monkeypatch):
    def load_base(*_, **__):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys.modules["iteris_core.cli.merge"], "load_base", load_base)
    out = tmp_path / "out.safetensors"
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell ignore it
    try:
        for extra in ([], ["--quiet"]):
            code, text, err = iteris.run(*merge(world, out, *extra))
            assert (code, text) == (130, ""), err
            assert "iteris: cancelled; nothing was written." in err
    finally:
        signal.signal(signal.SIGINT, former)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_ctrl_c_in_the_steps_writes_the_merge(world, tmp_path, iteris, monkeypatch):
    """Whichever held-out rows prefer: with the steps so far or without."""
    add, seen = RowGradients.add, []

    def add_some(self, rows, *, first):
        seen.extend([1] if first else [])  # no trial
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        add(self, rows, first=first)

    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs of a shell ignore it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(RowGradients, "add", add_some)
            text = iteris(*merge(world, tmp_path / "out.safetensors", "--set", "steps=4"))
    finally:
        signal.signal(signal.SIGINT, former)
    assert "steps: unet: stopped after 2 of 4" in text
    assert "Ctrl-C again leaves them out" in iteris.err
    assert "Wrote" in text
    iteris(*merge(world, tmp_path / "plain.safetensors"))
    without = same(tmp_path / "out.safetensors", tmp_path / "plain.safetensors")
    assert without == ("so they are left out" in text)


def test_pictures_reach_the_base(world, tmp_path, iteris, monkeypatch):
    import iteris_core.hosts.diffusers as diffusers_host

    for name in ("image", "mask"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    seen = {}

    def host(pipeline, **call):
        seen.update(call)
        raise cli.IterisError("stop here")

    monkeypatch.setattr(diffusers_host, "DiffusersHost", host)
    options = [f"--image={tmp_path}/image.png", f"--mask-image={tmp_path}/mask.png"]
    assert "stop here" in iteris.refused(*merge(world, tmp_path / "out.safetensors", *options))
    assert {name: picture.size for name, picture in seen.items()} == {
        "image": (8, 8), "mask_image": (8, 8),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--frames=5", "frames is for videos, and StableDiffusionPipeline draws none"),
        ("--image={folder}/picture.png", "StableDiffusionPipeline takes no image; leave it out"),
    ],
)
def test_what_the_base_does_not_take_is_refused(world, tmp_path, iteris, extra, message):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    out = tmp_path / "out.safetensors"
    assert message in iteris.refused(*merge(world, out, extra.format(folder=tmp_path)))
    assert not out.exists()
