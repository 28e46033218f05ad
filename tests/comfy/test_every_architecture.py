"""What every architecture of ComfyUI keeps to: a merge of one LoRA draws what the stock loader
draws with it, the number of rows in a forward does not matter, the saved file is what the node
hands on, and the base is bit by bit as it was.

With ``WRITE_RESULTS=1`` the figures go into benchmarks/results/architectures.json.
"""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from architecture_results import record
from figures import Trial, furthest
from kit import merge_on, part
from reduced_models import ARCHITECTURES, minimax_h3, svd, write_lora

ALONE, ROWS, FILE = 1e-3, 5e-3, 1e-3
IN_PARTS = ("SD 1.5", "FLUX.1", "Z-Image")
"""One of each kind of block, for the ways of running that take a model apart."""
ITERATED = tuple(n for n, of in ARCHITECTURES.items() if of.settings.get("schedule") == "jacobi")


def names(fast=(), left_out=()):
    """All architectures but those ``left_out``; ``fast`` says which are no slow tests."""
    return [
        pytest.param(
            name, marks=[pytest.mark.slow] if (name not in fast if fast else of.slow) else []
        )
        for name, of in ARCHITECTURES.items()
        if name not in left_out
    ]


@pytest.mark.parametrize("name", names())
def test_a_merge(pack, tmp_path, name):
    import comfyui_version

    reduced = ARCHITECTURES[name]
    trial = Trial(pack, reduced, tmp_path)
    alone = trial.alone()
    rows, file = trial.rows_and_file()
    remarks = {
        "left_out": reduced.left_out,
        "settings": ", ".join(f"{name}={value}" for name, value in reduced.settings.items()),
    }
    remarks = {key: text for key, text in remarks.items() if text}
    laws = {"alone": alone, "rows": rows, "file": file}
    record("comfyui", name, comfyui_version.__version__, **laws, drift=trial.drift, **remarks)
    assert (alone < ALONE, rows < ROWS, file < FILE) == (True,) * 3, laws
    assert trial.unchanged()


def test_a_class_that_nothing_names(pack, tmp_path, monkeypatch):
    """Tomorrow's: its classes have other names than today's, and there is no architecture at all
    that it could be taken for."""
    monkeypatch.setattr(part(pack, "iteris_core.architectures"), "ARCHITECTURES", ())
    trial = Trial(pack, ARCHITECTURES["Z-Image"], tmp_path)
    model = trial.model.model
    for thing in (model, model.diffusion_model, model.model_config):
        thing.__class__ = type("Tomorrow", (type(thing),), {})
    model.model_config.unet_config["image_model"] = "tomorrow"
    assert trial.alone() < ALONE
    rows, file = trial.rows_and_file()
    assert (rows < ROWS, file < FILE) == (True, True)


@pytest.mark.parametrize(
    "name", [name for name, of in ARCHITECTURES.items() if of.apart and "inputs" not in of.left_out]
)
def test_what_is_left_out_is_told_with_its_file(pack, tmp_path, name):
    """Layers that cannot be merged, in a LoRA that changes them."""
    reduced = ARCHITECTURES[name]
    trial = Trial(pack, dataclasses.replace(reduced, apart=()), tmp_path)
    with pytest.raises(trial.core.IterisError, match=r"1\.safetensors") as error:
        trial.merge(1)
    assert any(layer.rstrip(".") in str(error.value) for layer in reduced.apart)


@pytest.mark.parametrize(("make", "why"), [(minimax_h3, "its sound together"), (svd, "no text")])
def test_a_class_of_which_no_features_can_be_had(pack, tmp_path, make, why):
    """The refusal comes before anything runs, whatever CLIP is connected; weights can be merged."""
    model, clip = make()
    network, given = model.model.diffusion_model, part(pack, "iteris_core").Calibration(samples=1)
    sites = {
        f"diffusion_model.{name}": (*layer.weight.shape,)
        for name, layer in network.named_modules()
        if isinstance(layer, torch.nn.Linear)
    }
    spec = part(pack, "nodes.concept_specs").make_spec(
        write_lora(tmp_path / "a.safetensors", sites, 1), trigger="sks"
    )
    ran: list[object] = []
    for root in (network, clip.cond_stage_model):
        for module in root.modules():
            module.register_forward_pre_hook(lambda *_: ran.append(1))
    merge = functools.partial(merge_on, part(pack, "nodes.merging"), model, clip, [spec, spec])
    with pytest.raises(part(pack, "iteris_core").IterisError, match=f"{why}.*average"):
        merge("iteris", {}, given)
    assert not ran
    assert merge("average", {}, given).lora.sites


def test_no_codes_are_written_for_texts(pack):
    """ACE-Step 1.5's language model writes 600 a text, token by token."""
    clip = ARCHITECTURES["ACE-Step 1.5"].make()[1]
    clip.tokenizer = type(clip.tokenizer).__mro__[1]()
    assert clip.tokenize("a song")["lm_metadata"]["generate_audio_codes"]
    tokens = part(pack, "nodes.comfy_text").TextEncoders(clip).tokenize(0, "a song")
    assert not tokens["lm_metadata"]["generate_audio_codes"]


@pytest.mark.parametrize("name", names(IN_PARTS, left_out=ITERATED))
def test_a_merge_by_blocks(pack, tmp_path, monkeypatch, name):
    """As where memory is short, which it never is for models as small as these: blocks change
    arguments in place, and read options that the sampler hands on."""
    sweep, planner = (part(pack, f"iteris_core.passes.{module}") for module in ("sweep", "planner"))
    trial = Trial(pack, ARCHITECTURES[name], tmp_path)
    whole = trial.merge(2)
    replayed: list[int] = []

    def planned(run, stage, _, batching, **__):
        if not stage.sites:
            return planner.Plan(stage, batching.rows, planner.Strategy())
        barriers = planner.find(stage, run.lockstep).barriers(planner.THRESHOLDS.blocks[-1])
        barriers = planner.replayable(stage, run.lockstep, barriers)
        replayed.append(len(barriers.blocks))
        return planner.Plan(stage, batching.rows, planner.Strategy(barriers=barriers))

    monkeypatch.setattr(sweep, "planned", planned)
    assert furthest(trial.merge(2), whole) < ROWS
    assert min(replayed) > 0
    assert trial.unchanged()


@pytest.mark.parametrize("name", names((*IN_PARTS, "Krea 2", "HunyuanDiT", "HiDream O1")))
def test_steps_through_the_denoiser(pack, tmp_path, monkeypatch, name):
    """Blocks change arguments in place, and their weights were loaded in inference mode. Those of
    Krea 2 join their rows, of HunyuanDiT return views that are changed, of HiDream write to out."""
    merge = part(pack, "iteris_core.merge")
    monkeypatch.setattr(merge, "_better", lambda job, merged: (merged, {}))  # steps are kept
    trial = Trial(pack, ARCHITECTURES[name], tmp_path)
    with torch.inference_mode():
        plain, result = trial.merge(2), trial.merge(2, steps=3)
    assert all(bool(change.up.isfinite().all()) for change in result.lora.sites.values())
    assert furthest(result, plain) > 0
    assert trial.unchanged()
