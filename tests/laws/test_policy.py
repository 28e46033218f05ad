"""All thresholds in one place, and a merge's decisions based on them."""

import re

import pytest
import torch
from language_bases import make_t5
from oracle import ModuleHost, Net, dense_changes, difference, make_data, make_lora
from tiny import random_lora, two_concepts

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.hosts.transformers import TransformersHost
from iteris_core.solve.choose import THRESHOLDS, Thresholds


@pytest.mark.parametrize(
    ("samples", "timesteps", "loras", "ridge", "pull"),
    [
        (50, 4, 2, 1e-6, "mean"),
        (400, 4, 2, 1e-6, "mean"),
        (49, 4, 2, 1e-6 * (50 / 49) ** 5, "size"),
        (25, 4, 2, 3.2e-5, "size"),
        (25, 4, 1, 3.2e-5, "size"),
        (1, 4, 2, 1e-2, "size"),
        (6, 4, 2, 1e-2, "size"),
        (20, 4, 5, 1e-6, "mean"),  # of more LoRAs fewer samples are enough
        (10, 4, 10, 1e-6, "mean"),
        (10, 4, 5, 3.2e-5, "size"),
        (40, 1, 2, 1e-6 * (50 / 40) ** 5 * 4**1.25, "size"),  # one timestep is worth less
        (71, 1, 2, 1e-6, "mean"),
    ],
)
def test_ridge_and_pull_are_by_the_samples_that_ran(samples, timesteps, loras, ridge, pull):
    found = THRESHOLDS.ridge_for(samples, timesteps, loras)
    assert found == (pytest.approx(ridge), pull)
    assert Thresholds(ridge=0.1).ridge_for(samples, timesteps, loras)[0] == 0.1


def merged_and_ridges(host, concepts, **more):
    """The merge, and for which numbers of samples it asked the ridge."""
    asked: set[int] = set()

    class Watches(Thresholds):
        def ridge_for(self, samples, *more):
            asked.add(samples)
            return super().ridge_for(samples, *more)

    return merge_loras(host, concepts, thresholds=Watches(), **more), asked


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
def test_rows_that_a_plan_leaves_out_do_not_count_for_the_ridge(host):
    concepts = two_concepts(host)
    calibration = Calibration(samples=12, timesteps=2, latents="noise")
    _, whole = merged_and_ridges(host, concepts, calibration=calibration, memory_budget=None)
    assert whole == {12}
    small, ran = merged_and_ridges(host, concepts, calibration=calibration, memory_budget=3_000_000)
    (line,) = [line for line in small.report.plan if "do not fit" in line]
    kept, offered = map(int, re.search(r"(\d+) of (\d+) rows", line).groups())
    assert min(ran) == 12 * kept // offered < 12


def test_inputs_of_ones_own_count_for_the_ridge():
    torch.manual_seed(0)
    model, targets = make_t5()
    host = TransformersHost(model.eval())
    sites = [f"model.{name}" for name, _ in model.named_modules() if name.endswith(tuple(targets))]
    ids = torch.randint(3, 20, (6, 5))
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    concepts = [
        Concept(random_lora(host, seed, select=lambda site: site in sites), inputs=[batch])
        for seed in (1, 2)
    ]
    assert merged_and_ridges(host, concepts)[1] == {6}


@pytest.mark.parametrize(("rows", "shrink"), [(1, 0.7), (20, 1.0)])
def test_texts_are_balanced_alike_and_shrunk_where_tokens_are_few(rows, shrink):
    """One row has 12 tokens for at least 12 inputs."""
    host = ModuleHost(Net(), make_data(2, rows=rows))
    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    explicit = {"weighting": "none", "shrink": shrink}
    found, wanted = (
        merge_loras(host, concepts, settings={"precision": "float64", **more}).lora
        for more in ({}, explicit)
    )
    assert difference(found, dense_changes(wanted)) == 0
    host.pictures = True
    images = merge_loras(host, concepts, settings={"precision": "float64", "steps": 0}).lora
    assert (difference(images, dense_changes(wanted)) > 1e-3) == (shrink < 1)
