"""A preview predicts the merge, is refused where the merge is, and leaves nothing behind."""

import json
from dataclasses import asdict

import pytest
import torch
from bases import make_lora as make_small
from bases import tiny
from oracle import Net, hooks_on, make_data, make_lora
from test_preflight import CASES, Half, PictureHost, concepts

from iteris_core import Concept, IterisError, merge_loras
from iteris_core.errors import OutOfMemory, SiteError
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.preview import preview_merge

pytestmark = pytest.mark.usefixtures("unmeasured")

QUICK = {"samples": 6, "timesteps": 2, "denoising_steps": 4, "latent_size": 8}


def host_of(model):
    return PictureHost(model(), make_data())


def of_texts_and_pictures():
    """LoRAs on the text encoder and the UNet."""
    host = DiffusersHost(tiny("sd1"))
    parts = "text_model.encoder.layers.0.mlp.fc1", "attn1.to_q", "attn2.to_k"
    sites = tuple(site for site in host.sites() if site.endswith(parts))
    some = [Concept(make_small("sd1", sites, n), trigger=f"s{n}", class_word="dog") for n in (0, 1)]
    return host, some


def test_a_preview_leaves_nothing_behind():
    some = [Concept(make_lora(i, sites=("q",)), prompts=["unused"]) for i in (1, 2)]
    host = host_of(Net)
    before = {name: weight.clone() for name, weight in host.model.state_dict().items()}
    assert preview_merge(host, some, memory_budget=2**30).plan
    assert hooks_on(host.model) == 0
    assert all(torch.equal(before[n], w) for n, w in host.model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("memory_budget", [2**30, 6 * 2**18])
def test_all_parts_have_the_rows_of_the_merge(memory_budget):
    """A text encoder's rows are those that the denoiser needs, whether or not all fit."""
    host, some = of_texts_and_pictures()
    how = {"calibration": QUICK, "memory_budget": memory_budget}
    found = preview_merge(host, some, **how)
    made = merge_loras(host, some, **how).report
    assert found.plan == made.plan
    parts = ["text encoder", "unet", "steps through the unet"]
    assert [line.partition(":")[0] for line in found.plan] == parts
    assert bool(made.short) == (memory_budget < 2**30)
    notes = {name: of for name, of in made.notes.items() if name != "steps"}  # when they are taken
    assert found.notes == [f"{name}: {note}" for name, of in notes.items() for note in of]
    assert json.loads(json.dumps(asdict(found)))["denoised"] == found.denoised == 2 * 6 * 4


def test_what_does_not_fit_is_refused_before_it_is_denoised():
    host, some = of_texts_and_pictures()
    told = []
    for run in (preview_merge, merge_loras):
        with pytest.raises(OutOfMemory, match="text encoder needs at least"):
            run(host, some, calibration=QUICK, memory_budget=2**14, on_progress=told.append)
    assert told
    assert not any(progress.what == "denoising steps" for progress in told)


def test_the_time_includes_samples_and_steps():
    host, some = of_texts_and_pictures()
    none = {"steps": 0}
    ways = (none, {"latents": "noise"}), (none, {"denoising_steps": 400}), ({"steps": 400}, {})
    least, denoised, stepped = (
        preview_merge(host, some, settings=settings, calibration={**QUICK, **more}).seconds
        for settings, more in ways
    )
    assert min(denoised, stepped) > 3 * least, (least, denoised, stepped)


def test_what_cannot_be_merged_is_refused_or_said():
    model, why = CASES[0]
    with pytest.raises(SiteError, match=r"1 sites, such as up \(in lora-1, ") as caught:
        preview_merge(host_of(model), concepts(), memory_budget=2**30)
    assert why in str(caught.value)
    found = preview_merge(host_of(model), concepts(), unmergeable="mean")
    (note,) = (one for one in found.notes if why in one)
    assert note.endswith("they get the mean of the LoRAs")
    assert note in found.lines()


def test_weights_alone_need_no_rows():
    found = preview_merge(host_of(Half), concepts(), "ties")
    assert found.plan == ["ties looks at weights only: no rows"]
    assert (found.denoised, found.seconds) == (0, None)


def test_nothing_to_merge():
    with pytest.raises(IterisError, match="no LoRA to merge"):
        preview_merge(host_of(Half), [])
