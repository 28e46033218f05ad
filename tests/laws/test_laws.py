"""The numerical laws of the merge, against the dense float64 transcription in oracle.py."""

import itertools

import pytest
import torch
from oracle import (
    SITES,
    ModuleHost,
    Net,
    captured_inputs,
    changed,
    dense_changes,
    difference,
    jacobi,
    make_data,
    make_lora,
)
from small_merge import EXACT, merge

from iteris_core import Concept, merge_loras

WIDE = 1000  # a rank beyond every site's size: nothing is truncated


def converged(loras, data, **settings):
    """The paper's iteration, after which nothing moves."""
    usual = {"objective": "output", "ridge": 1e-4, "weighting": "tokens"}
    return jacobi(Net(), loras, data, iterations=len(SITES) + 1, **{**usual, **settings})


@pytest.mark.parametrize("weighting", ["adapter", "tokens", "full", "none"])
@pytest.mark.parametrize("iterations", [1, 5])
@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_jacobi_is_the_papers_dense_algorithm(objective, iterations, weighting):
    loras = [make_lora(1), make_lora(2, rank=3)]
    data = make_data(2)
    settings = {"objective": objective, "weighting": weighting, "ridge": 1e-4}
    settings["iterations"] = iterations
    ours = merge(loras, data, schedule="jacobi", rank=WIDE, bound=0.0, **settings)
    dense = jacobi(Net(), loras, data, **settings)
    assert difference(ours.lora, dense) < 1e-9


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_shrink_is_a_pull_by_each_features_energy(objective):
    loras = [make_lora(1), make_lora(2, rank=3)]
    data = make_data(2)
    settings = {"objective": objective, "weighting": "tokens", "ridge": 1e-4, "shrink": 0.6}
    ours = merge(loras, data, schedule="jacobi", iterations=3, rank=WIDE, **settings)
    dense = jacobi(Net(), loras, data, iterations=3, **settings)
    assert difference(ours.lora, dense) < 1e-9
    # At the other end no feature speaks for another: a mean of the changes, weighted per feature.
    ours = merge(
        loras, data, objective=objective, shrink=1e-12, ridge=0.0, schedule="jacobi", iterations=1
    )
    first = SITES[0]
    energies = [(x.reshape(-1, x.shape[-1]) ** 2).mean(0) for x in data]
    total = sum(lora.sites[first].dense() * e for lora, e in zip(loras, energies, strict=True))
    wanted = total / sum(energies)
    assert torch.allclose(ours.lora.sites[first].dense(), wanted, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_sweep_is_the_converged_jacobi_iteration(objective, rank):
    loras = [make_lora(1), make_lora(2, rank=3)]
    data = make_data(2)
    plain = {"objective": objective, "ridge": 1e-4, "weighting": "tokens", "rank": rank}
    ours = merge(loras, data, bound=0.0, **plain)
    dense = converged(loras, data, objective=objective, rank=rank or 5)
    assert difference(ours.lora, dense) < 1e-8
    iterated = {"schedule": "jacobi", "iterations": len(SITES) + 1, "bound": 0.0}
    ours_jacobi = merge(loras, data, **plain, **iterated)
    assert difference(ours.lora, dense_changes(ours_jacobi.lora)) < 1e-9


@pytest.mark.parametrize("schedule", ["sweep", "jacobi"])
@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_one_lora_alone_gives_itself_back(objective, schedule):
    lora = make_lora(1)
    ours = merge([lora], objective=objective, schedule=schedule)
    assert difference(ours.lora, dense_changes(lora)) < 1e-9


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_order_does_not_matter(objective):
    loras, data = [make_lora(i, rank=i) for i in (1, 2, 3)], make_data(3)
    first = merge(loras, data, objective=objective)
    for order in itertools.islice(itertools.permutations(range(3)), 1, None):
        other = merge([loras[i] for i in order], [data[i] for i in order], objective=objective)
        assert difference(other.lora, dense_changes(first.lora)) < 1e-9


@pytest.mark.parametrize("schedule", ["sweep", "jacobi"])
@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_micro_batch_size_does_not_matter(objective, schedule):
    loras = [make_lora(1), make_lora(2)]
    whole = merge(loras, objective=objective, schedule=schedule, iterations=3, micro_batch=100)
    for size in (1, 5):
        part = merge(loras, objective=objective, schedule=schedule, iterations=3, micro_batch=size)
        assert difference(part.lora, dense_changes(whole.lora)) < 1e-9


class Unshared(Net):
    """Every site gets a tensor of its own."""

    def __init__(self):
        super().__init__()
        for site in SITES:
            module = self.get_submodule(site)
            module.register_forward_pre_hook(lambda _, args: (args[0].clone(),))


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_shared_inputs_change_nothing(objective):
    loras = [make_lora(1), make_lora(2)]
    shared = merge(loras, objective=objective, weighting="adapter")
    alone = merge(loras, objective=objective, weighting="adapter", model=Unshared())
    assert difference(alone.lora, dense_changes(shared.lora)) < 1e-12


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_strength_zero_removes_a_concept(objective):
    loras, data = [make_lora(1), make_lora(2), make_lora(3)], make_data(3)
    without = merge([loras[0], loras[2]], [data[0], data[2]], objective=objective)

    class Host(ModuleHost):
        def samples(self, request):
            assert [c.lora.name for c in request.concepts] == ["lora-1", "lora-3"]
            return [data[0], data[2]]

    concepts = [
        Concept(lora, prompts=["unused"], strength=s)
        for lora, s in zip(loras, (1, 0, 1), strict=True)
    ]
    ours = merge_loras(Host(Net(), data), concepts, settings={**EXACT, "objective": objective})
    assert difference(ours.lora, dense_changes(without.lora)) < 1e-12


def test_strength_scales_the_change():
    lora = make_lora(1)
    ours = merge([lora], strengths=[0.5])
    half = {site: change / 2 for site, change in dense_changes(lora).items()}
    assert difference(ours.lora, half) < 1e-9


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_weights_are_factors_of_lambda(objective):
    loras, data = [make_lora(1), make_lora(2)], make_data(2)
    ours = merge(loras, data, objective=objective, weights=[3.0, 0.5], ridge=1e-4, rank=WIDE)
    dense = converged(loras, data, objective=objective, weights=[3.0, 0.5])
    assert difference(ours.lora, dense) < 1e-8


@pytest.mark.parametrize("objective", ["adapter", "output"])
def test_sites_in_one_lora_only_count_as_no_change_in_the_other(objective):
    loras = [make_lora(1, sites=("q", "out", "up")), make_lora(2, sites=("k", "out", "conv"))]
    data = make_data(2)
    ours = merge(loras, data, objective=objective, ridge=1e-4, rank=WIDE)
    dense = converged(loras, data, objective=objective)
    assert set(ours.lora.sites) == {"q", "k", "out", "up", "conv"}
    assert difference(ours.lora, dense) < 1e-8


def test_preserved_prompts_hold_the_base_where_it_was():
    lora, data = make_lora(1), make_data(2)
    ours = merge([lora, None], data, ridge=1e-4, rank=WIDE)
    assert difference(ours.lora, converged([lora, None], data)) < 1e-8
    free = merge([lora], [data[0]], ridge=1e-4, rank=WIDE)

    def drift(change):
        with torch.no_grad():
            moved = changed(Net(), dense_changes(change))(data[1])
            return float((moved - Net()(data[1])).norm())

    assert drift(ours.lora) < 0.8 * drift(free.lora)


def test_residuals_are_what_the_solution_leaves():
    """The report's figures against outputs computed from dense weights."""
    loras, data, model = [make_lora(1), make_lora(2)], make_data(2), Net()
    for objective in ("adapter", "output"):
        ours = merge(loras, data, model, objective=objective)
        merged = dense_changes(ours.lora)
        final = changed(model, merged)
        for index, lora in enumerate(loras):
            reference = captured_inputs(changed(model, dense_changes(lora)), data[index])
            seen = captured_inputs(final, data[index])
            for site, report in ours.report.sites.items():
                w0 = model.get_submodule(site).weight.detach().flatten(1)
                change = dense_changes(lora)[site]
                if objective == "adapter":
                    target = reference[site] @ change.mT
                else:
                    target = reference[site] @ (w0 + change).mT - seen[site] @ w0.mT
                left = (target - seen[site] @ merged[site].mT).norm() / target.norm()
                assert report.after[index] == pytest.approx(float(left), rel=1e-6)


def test_average_and_sum_are_exact():
    loras = [make_lora(1, rank=2), make_lora(2, rank=3)]
    first, second = map(dense_changes, loras)
    concepts = [Concept(loras[0], weight=1.0), Concept(loras[1], weight=3.0, strength=0.5)]
    average = merge_loras(None, concepts, "average").lora
    total = merge_loras(None, concepts, "sum").lora
    wanted = {s: (first[s] + 3 * 0.5 * second[s]) / 4 for s in first}
    assert difference(average, wanted) < 1e-12
    assert difference(total, {s: 4 * wanted[s] for s in wanted}) < 1e-12
    cut = merge_loras(None, concepts, "average", settings={"rank": 2}).lora
    for site, change in cut.sites.items():
        assert change.rank == 2
        singular = torch.linalg.svdvals(wanted[site])
        error = float((change.dense() - wanted[site]).norm())
        assert error == pytest.approx(float(singular[2:].norm()), abs=1e-9)
