"""Edge cases of a merge: degenerate inputs, other precisions, failures, wrong settings."""

from __future__ import annotations

import itertools

import pytest
import rivals  # noqa: F401 (registers them)
import torch
from oracle import (
    ModuleHost,
    Net,
    dense_changes,
    difference,
    hooks_on,
    make_data,
    make_lora,
)
from small_merge import merge

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.errors import IterisError
from iteris_core.methods.registry import all_methods

WIDE = 1000  # a rank beyond every site's size: nothing is truncated


@pytest.mark.parametrize("objective", ["adapter", "output"])
@pytest.mark.parametrize("ridge", [0.0, 1e-5])
def test_rank_deficient_inputs_have_a_solution(objective, ridge):
    data = [torch.ones(2, 12, 12, dtype=torch.float64), -torch.ones(1, 12, 12, dtype=torch.float64)]
    ours = merge([make_lora(1), make_lora(2)], data, objective=objective, ridge=ridge)
    for change in ours.lora.sites.values():
        assert bool(torch.isfinite(change.dense()).all())


@pytest.mark.parametrize("objective", ["adapter", "output"])
@pytest.mark.parametrize("weighting", ["adapter", "tokens", "full", "none"])
def test_all_zero_inputs_give_the_mean(objective, weighting):
    data = [torch.zeros(2, 12, 12, dtype=torch.float64) for _ in range(2)]
    loras = [make_lora(1), make_lora(2)]
    model = Net()
    for parameter in model.parameters():
        parameter.data.mul_(parameter.ndim > 1)  # no biases: zeros stay zeros
    ours = merge(loras, data, model, objective=objective, weighting=weighting, rank=WIDE)
    first, second = map(dense_changes, loras)
    assert difference(ours.lora, {s: (first[s] + second[s]) / 2 for s in first}) < 1e-9


@pytest.mark.parametrize("method", [method.name for method in all_methods() if method.needs_host])
def test_every_method_merges_under_autocast(method):
    model = Net().float()
    sites = ("q", "up")
    loras = [make_lora(seed, sites=sites) for seed in (1, 2)]
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    host = ModuleHost(model, [rows.float() for rows in make_data()])
    if method == "custom-diffusion":
        pytest.skip("it merges cross-attention alone")
    plain = merge_loras(host, concepts, method).lora
    with torch.autocast("cpu", torch.bfloat16):
        lora = merge_loras(host, concepts, method).lora
    assert difference(lora, dense_changes(plain)) < 0.1


def test_nan_in_the_base_is_an_error_that_names_the_site():
    model = Net()
    model.q.weight.data[0, 0] = float("nan")
    with pytest.raises(IterisError, match=r"Site q: .*NaN"):
        merge([make_lora(1), make_lora(2)], model=model)


@pytest.mark.parametrize("end", ["success", "exception", "cancel"])
@pytest.mark.parametrize("schedule", ["sweep", "jacobi"])
def test_the_base_is_bit_identical_afterwards(schedule, end):
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    host = ModuleHost(model, make_data(2))
    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    calls = itertools.count()

    def on_progress(_):
        if end != "success" and next(calls) == 3:
            raise RuntimeError("broken") if end == "exception" else KeyboardInterrupt

    def run():
        return merge_loras(
            host,
            concepts,
            settings={"schedule": schedule, "micro_batch": 5},
            on_progress=on_progress,
        )

    if end == "success":
        run()
    elif end == "cancel":
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        with pytest.raises(RuntimeError, match="broken"):
            run()
    assert hooks_on(model) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_site_that_is_never_reached_is_an_error():
    class Half(Net):
        def forward(self, x):
            return self.q(x)

    with pytest.raises(IterisError, match="never reached"):
        merge([make_lora(1), make_lora(2)], model=Half())


def test_no_lora_at_all_is_an_error():
    with pytest.raises(IterisError, match="no LoRA"):
        merge_loras(None, [Concept(None, prompts=["a dog"])], "average")
    with pytest.raises(IterisError, match="no site"):
        merge_loras(None, [Concept(Lora({}))], "average")


def test_changes_of_different_shapes_are_an_error():
    one = Lora({"q": LowRank(torch.ones(3, 1), torch.ones(1, 4))})
    two = Lora({"q": LowRank(torch.ones(5, 1), torch.ones(1, 4))})
    with pytest.raises(IterisError, match="Site q has changes of different shapes"):
        merge_loras(None, [Concept(one), Concept(two)], "sum")
