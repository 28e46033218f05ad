"""Edge cases of a merge: degenerate inputs, other precisions, failures, wrong settings."""

import pytest
import rivals  # noqa: F401 (registers them)
import torch
from oracle import Net, dense_changes, difference, make_lora
from small_merge import merge

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.errors import IterisError

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


def test_nan_in_the_base_is_an_error_that_names_the_site():
    model = Net()
    model.q.weight.data[0, 0] = float("nan")
    with pytest.raises(IterisError, match=r"Site q: .*NaN"):
        merge([make_lora(1), make_lora(2)], model=model)


def test_a_site_that_is_never_reached_is_an_error():
    class Half(Net):
        def forward(self, x):
            return self.q(x)

    with pytest.raises(IterisError, match="not used by this base"):
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
