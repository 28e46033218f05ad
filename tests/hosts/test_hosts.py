"""What every host has to keep to: one suite over pipelines of diffusers and models of transformers.

Each case is a tiny real model with random weights. What a library makes of a merged file is held
against the same changes added to the weights.
"""

import copy
from dataclasses import replace

import pytest
import torch
from host_cases import CALIBRATION, CASES, PIPELINES, make_case, two_concepts
from language_bases import MAKERS, largest_gap, tuned_folder
from peft import PeftModel

from iteris_core import Calibration, Concept, Lora, LowRank, merge_loras
from iteris_core.activations.lockstep import Lockstep
from iteris_core.errors import IterisError
from iteris_core.hosts.protocol import SampleRequest
from iteris_core.lora_files.peft_folder import write_adapter

FAST = [pytest.param(c, marks=pytest.mark.slow) if c in ("sdxl", "sd3") else c for c in CASES]
"""SDXL and SD 3 have the kinds of blocks that SD 1.x and FLUX.1 have, and more of them."""


@pytest.fixture(params=FAST)
def case(request):
    return make_case(request.param)


@pytest.fixture(params=FAST)
def case64(request):
    return make_case(request.param, torch.float64)


@pytest.fixture(params=PIPELINES)
def pipeline_case(request):
    return make_case(request.param)


@pytest.fixture(params=list(MAKERS))
def model_case(request):
    return make_case(request.param)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def add_to_weights(host, lora: Lora, sign: float = 1.0) -> None:
    for site, change in lora.sites.items():
        module = host.sites()[site]
        dense = change.dense().mT if hasattr(module, "nf") else change.dense()  # GPT-2's Conv1D
        module.weight.data += sign * dense.reshape(module.weight.shape).to(module.weight)


def state_of(case) -> dict[str, torch.Tensor]:
    return {
        f"{index}.{name}": value.clone()
        for index, model in enumerate(case.models())
        for name, value in model.state_dict().items()
    }


def settings_of(case) -> tuple:
    """Of a pipeline: its parts, and what its scheduler and its bars are set to."""
    if (pipeline := getattr(case, "pipeline", None)) is None:
        return ()
    config, bars = {**pipeline.scheduler.config}, getattr(pipeline, "_progress_bar_config", {})
    steps = getattr(pipeline.scheduler, "num_inference_steps", None)
    return pipeline.components, config, steps, {**bars}


def hooks_of(case) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))
        for model in case.models()
        for module in model.modules()
    )


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_a_sweep_is_the_converged_iteration(case64):
    every = sorted(case64.lora(1).sites)
    some = set(every[:: max(1, len(every) // 4)])
    concepts = two_concepts(case64, some.__contains__)
    settings = {"precision": "float64", "ridge": 1e-4, "repair": False}
    settings["bound"] = 0.0
    calibration = replace(CALIBRATION, conditions=0.0)  # iterations have plain rows
    # A site depends on those before it only, so that as many iterations as sites are enough.
    sweep, iterated = (
        merge_loras(case64.host, concepts, settings=more, calibration=calibration)
        for more in (
            {**settings, "micro_batch": 5},
            {**settings, "schedule": "jacobi", "iterations": len(some) + 1},
        )
    )
    assert largest_gap(sweep.lora, iterated.lora) < 1e-8


def test_one_lora_alone_is_given_back(case64):
    lora = case64.lora(1)
    alone = merge_loras(
        case64.host,
        [case64.concept(lora)],
        settings={"precision": "float64"},
        calibration=CALIBRATION,
    )
    assert largest_gap(alone.lora, lora) < 1e-6


def test_the_base_is_bit_identical_whatever_happens(case):
    """And a pipeline's parts and settings are what they were."""
    before, settings, hooks = state_of(case), settings_of(case), hooks_of(case)
    random_state = torch.get_rng_state()
    steps: list[str] = []

    def check():
        after = state_of(case)
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        assert settings_of(case) == settings
        assert hooks_of(case) == hooks
        assert torch.equal(torch.get_rng_state(), random_state)

    def merge(concepts, stop_at: int | None = None):
        steps.clear()

        def on_progress(progress):
            steps.append(progress)
            if len(steps) == stop_at:
                raise KeyboardInterrupt

        merge_loras(case.host, concepts, calibration=CALIBRATION, on_progress=on_progress)

    merge(two_concepts(case))
    check()
    whole = len(steps)
    for stop_at in (whole // 4, 2 * whole // 3):  # while samples are made, and sites solved
        with pytest.raises(KeyboardInterrupt):
            merge(two_concepts(case), stop_at)
        check()
    concepts = two_concepts(case)
    site = list(concepts[1].lora.sites)[-2]
    broken = dict(concepts[1].lora.sites)
    broken[site] = LowRank(broken[site].up * float("nan"), broken[site].down)
    with pytest.raises(IterisError, match="NaN"):
        merge([concepts[0], case.concept(Lora(broken, "broken"))])
    check()


def test_peft_loads_what_was_read_and_merged(model_case, tmp_path):
    case = model_case
    concepts = []
    for seed in (1, 2):
        folder = tuned_folder(case.model, case.targets, tmp_path / f"{seed}", seed, r=2 + seed)
        concepts.append(case.concept(case.host.read_lora(folder), seed))
    result = merge_loras(None, concepts, "average")
    folder = write_adapter(result.lora, tmp_path / "merged")
    loaded = PeftModel.from_pretrained(copy.deepcopy(case.model), folder)
    base, theirs = case.outputs(), case.outputs(loaded)
    add_to_weights(case.host, result.lora)
    assert relative(theirs, case.outputs()) < 1e-5
    assert relative(base, theirs) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_latents_are_those_of_the_pipeline_with_the_lora(pipeline_case, guidance):
    """Every step of the host's own denoising is a step of ``pipeline(prompt)``."""
    case = pipeline_case
    case.pipeline.set_progress_bar_config(disable=True)
    concept = Concept(case.lora(1), prompts=["a dog"])
    calibration = Calibration(
        samples=1, timesteps=4, denoising_steps=4, latent_size=8, guidance=guidance
    )
    references = {site: [change] for site, change in concept.lora.sites.items()}
    with Lockstep(case.host.sites(), references) as lockstep:
        generator = torch.Generator().manual_seed(0)
        request = SampleRequest([concept], calibration, lockstep, generator, lambda *_: None)
        rows = case.host.samples(request)
    kept: list[torch.Tensor] = []

    def keep(_, __, ___, found):
        kept.append(found["latents"].clone())
        return {}

    add_to_weights(case.host, concept.lora)
    drawn = rows.moving["sample" if hasattr(case.pipeline, "unet") else "hidden_states"]
    scale = {} if case.kind == "flux" and guidance == 1 else {"guidance_scale": guidance}
    case.pipeline(
        "a dog", height=64, width=64, num_inference_steps=4, latents=drawn[:1],
        output_type="latent", callback_on_step_end=keep, **scale,
    )  # fmt: skip
    for step in range(3):
        assert relative(drawn[step + 1], kept[step][0]) < 1e-4
