"""The numerical laws of the merge, against the dense float64 transcription in oracle.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import (
    SITES,
    ModuleHost,
    Net,
    dense_changes,
    difference,
    hooks_on,
    jacobi,
    make_data,
    make_lora,
)

from iteris_core import Concept, Lora, LowRank, MergeCancelled, merge_loras
from iteris_core.collector import Collector
from iteris_core.errors import IterisError
from iteris_core.methods import iteris as iteris_method

WIDE = 1000  # a rank beyond every site's size: nothing is truncated


def merge(loras, data=None, model=None, *, weights=None, strengths=None, **settings):
    data = data or make_data(len(loras))
    host = ModuleHost(model or Net(), data)
    concepts = [
        Concept(
            lora,
            prompts=["unused"],
            weight=1.0 if weights is None else weights[i],
            strength=1.0 if strengths is None else strengths[i],
        )
        for i, lora in enumerate(loras)
    ]
    return merge_loras(host, concepts, settings={"statistics": "float64", **settings})


@pytest.mark.parametrize("balance", ["adapter", "tokens", "full", "none"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("align", ["adapter", "full"])
def test_jacobi_is_the_papers_dense_algorithm(align, iterations, balance):
    loras = [make_lora(1), make_lora(2, rank=3)]
    data = make_data(2)
    ours = merge(
        loras,
        data,
        align=align,
        schedule="jacobi",
        iterations=iterations,
        balance=balance,
        ridge=1e-4,
        rank=WIDE,
    )
    dense = jacobi(
        Net(), loras, data, iterations=iterations, align=align, ridge=1e-4, balance=balance
    )
    assert difference(ours.lora, dense) < 1e-9


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_shrink_is_a_pull_by_each_features_energy(align):
    loras = [make_lora(1), make_lora(2, rank=3)]
    data = make_data(2)
    settings = {"align": align, "balance": "tokens", "ridge": 1e-4, "shrink": 0.6}
    ours = merge(loras, data, schedule="jacobi", iterations=3, rank=WIDE, **settings)
    dense = jacobi(Net(), loras, data, iterations=3, **settings)
    assert difference(ours.lora, dense) < 1e-9
    # At the other end no feature speaks for another: a mean of the changes, weighted per feature.
    ours = merge(loras, data, align=align, shrink=1e-12, ridge=0.0, schedule="jacobi", iterations=1)
    first = SITES[0]
    energies = [(x.reshape(-1, x.shape[-1]) ** 2).mean(0) for x in data]
    total = sum(lora.sites[first].dense() * e for lora, e in zip(loras, energies, strict=True))
    wanted = total / sum(energies)
    assert torch.allclose(ours.lora.sites[first].dense(), wanted, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("align", ["adapter", "full"])
def test_sweep_is_the_converged_jacobi_iteration(align, rank):
    loras = [make_lora(1), make_lora(2, rank=3)]
    data = make_data(2)
    ours = merge(loras, data, align=align, ridge=1e-4, balance="tokens", rank=rank)
    dense = jacobi(
        Net(),
        loras,
        data,
        iterations=len(SITES) + 1,
        align=align,
        ridge=1e-4,
        balance="tokens",
        rank=rank or 5,
    )
    assert difference(ours.lora, dense) < 1e-8
    ours_jacobi = merge(
        loras,
        data,
        align=align,
        ridge=1e-4,
        balance="tokens",
        rank=rank,
        schedule="jacobi",
        iterations=len(SITES) + 1,
    )
    assert difference(ours.lora, dense_changes(ours_jacobi.lora)) < 1e-9


def test_adapter_rank_is_the_sum_of_ranks():
    ours = merge([make_lora(1, rank=2), make_lora(2, rank=3)], align="adapter")
    assert ours.lora.ranks == {4, 5}  # the convolution has four outputs


@pytest.mark.parametrize("schedule", ["sweep", "jacobi"])
@pytest.mark.parametrize("align", ["adapter", "full"])
def test_one_lora_alone_gives_itself_back(align, schedule):
    lora = make_lora(1)
    ours = merge([lora], align=align, schedule=schedule)
    assert difference(ours.lora, dense_changes(lora)) < 1e-9


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_the_same_lora_many_times_gives_itself_back(align):
    lora = make_lora(1)
    ours = merge([lora, lora, lora], align=align)
    assert difference(ours.lora, dense_changes(lora)) < 1e-9


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_order_does_not_matter(align):
    loras, data = [make_lora(i, rank=i) for i in (1, 2, 3)], make_data(3)
    first = merge(loras, data, align=align)
    for order in itertools.islice(itertools.permutations(range(3)), 1, None):
        other = merge([loras[i] for i in order], [data[i] for i in order], align=align)
        assert difference(other.lora, dense_changes(first.lora)) < 1e-9


@pytest.mark.parametrize("schedule", ["sweep", "jacobi"])
@pytest.mark.parametrize("align", ["adapter", "full"])
def test_micro_batch_size_does_not_matter(align, schedule):
    loras = [make_lora(1), make_lora(2)]
    whole = merge(loras, align=align, schedule=schedule, iterations=3, micro_batch=100)
    for size in (1, 4, 5, 7):
        part = merge(loras, align=align, schedule=schedule, iterations=3, micro_batch=size)
        assert difference(part.lora, dense_changes(whole.lora)) < 1e-9


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_shared_inputs_change_nothing(align, monkeypatch):
    loras = [make_lora(1), make_lora(2)]
    shared = merge(loras, align=align, balance="adapter")
    made = []

    def unshared(*args, **kwargs):
        made.append(Collector(*args, **kwargs, share=False))
        return made[-1]

    monkeypatch.setattr(iteris_method, "Collector", unshared)
    alone = merge(loras, align=align, balance="adapter")
    assert made
    assert difference(alone.lora, dense_changes(shared.lora)) < 1e-12


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_strength_zero_removes_a_concept(align):
    loras, data = [make_lora(1), make_lora(2), make_lora(3)], make_data(3)
    without = merge([loras[0], loras[2]], [data[0], data[2]], align=align)

    class Host(ModuleHost):
        def samples(self, concepts, *args):
            assert [c.lora.name for c in concepts] == ["lora-1", "lora-3"]
            return [data[0], data[2]]

    concepts = [
        Concept(lora, prompts=["unused"], strength=s)
        for lora, s in zip(loras, (1, 0, 1), strict=True)
    ]
    ours = merge_loras(
        Host(Net(), data), concepts, settings={"statistics": "float64", "align": align}
    )
    assert difference(ours.lora, dense_changes(without.lora)) < 1e-12


def test_strength_scales_the_change():
    lora = make_lora(1)
    ours = merge([lora], strengths=[0.5])
    half = {site: change / 2 for site, change in dense_changes(lora).items()}
    assert difference(ours.lora, half) < 1e-9


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_weights_are_factors_of_lambda(align):
    loras, data = [make_lora(1), make_lora(2)], make_data(2)
    ours = merge(loras, data, align=align, weights=[3.0, 0.5], ridge=1e-4, rank=WIDE)
    dense = jacobi(
        Net(),
        loras,
        data,
        iterations=len(SITES) + 1,
        align=align,
        ridge=1e-4,
        balance="tokens",
        weights=[3.0, 0.5],
    )
    assert difference(ours.lora, dense) < 1e-8


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_sites_in_one_lora_only_count_as_no_change_in_the_other(align):
    loras = [make_lora(1, sites=("q", "out", "up")), make_lora(2, sites=("k", "out", "conv"))]
    data = make_data(2)
    ours = merge(loras, data, align=align, ridge=1e-4, rank=WIDE)
    dense = jacobi(
        Net(),
        loras,
        data,
        iterations=len(SITES) + 1,
        align=align,
        ridge=1e-4,
        balance="tokens",
    )
    assert set(ours.lora.sites) == {"q", "k", "out", "up", "conv"}
    assert difference(ours.lora, dense) < 1e-8


def test_preserved_prompts_hold_the_base_where_it_was():
    lora, data = make_lora(1), make_data(2)
    ours = merge([lora, None], data, ridge=1e-4, rank=WIDE)
    dense = jacobi(
        Net(),
        [lora, None],
        data,
        iterations=len(SITES) + 1,
        align="full",
        ridge=1e-4,
        balance="tokens",
    )
    assert difference(ours.lora, dense) < 1e-8
    free = merge([lora], [data[0]], ridge=1e-4, rank=WIDE)

    def drift(change):
        from oracle import changed

        with torch.no_grad():
            moved = changed(Net(), dense_changes(change))(data[1])
            return float((moved - Net()(data[1])).norm())

    assert drift(ours.lora) < 0.8 * drift(free.lora)


@pytest.mark.parametrize("align", ["adapter", "full"])
@pytest.mark.parametrize("ridge", [0.0, 1e-5])
def test_rank_deficient_inputs_have_a_solution(align, ridge):
    data = [torch.ones(2, 12, 12, dtype=torch.float64), -torch.ones(1, 12, 12, dtype=torch.float64)]
    ours = merge([make_lora(1), make_lora(2)], data, align=align, ridge=ridge)
    for change in ours.lora.sites.values():
        assert bool(torch.isfinite(change.dense()).all())


@pytest.mark.parametrize("align", ["adapter", "full"])
@pytest.mark.parametrize("balance", ["adapter", "tokens", "full", "none"])
def test_all_zero_inputs_give_the_mean(align, balance):
    data = [torch.zeros(2, 12, 12, dtype=torch.float64) for _ in range(2)]
    loras = [make_lora(1), make_lora(2)]
    model = Net()
    for parameter in model.parameters():
        parameter.data.mul_(parameter.ndim > 1)  # no biases: zeros stay zeros
    ours = merge(loras, data, model, align=align, balance=balance, rank=WIDE)
    first, second = map(dense_changes, loras)
    assert difference(ours.lora, {s: (first[s] + second[s]) / 2 for s in first}) < 1e-9


def test_float32_statistics_agree_with_the_converged_iteration():
    loras = [make_lora(1), make_lora(2)]
    for align in ("adapter", "full"):
        sweep = merge(loras, align=align, statistics="float32")
        converged = merge(loras, align=align, statistics="float32", schedule="jacobi", iterations=8)
        assert difference(sweep.lora, dense_changes(converged.lora)) < 1e-5


@pytest.mark.parametrize("align", ["adapter", "full"])
def test_lower_matmul_precision_and_autocast_do_not_reach_the_moments(align):
    """Under bfloat16 autocast and "medium" products the statistics of given inputs stay exact."""
    from iteris_core.moments import add_inputs, add_target, full_precision, new_inputs, new_target

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator)
    cpu, single = torch.device("cpu"), torch.float32

    def collect():
        inputs = new_inputs(48, cross=align == "adapter", dtype=single, device=cpu)
        target = new_target(48, 48, None, full=align == "full", dtype=single, device=cpu)
        with full_precision(cpu):
            add_inputs(inputs, x, x)
            add_target(target, None, x, x, 2 * x, x)
        return inputs.own

    wanted = collect()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = collect()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(found, wanted)


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

    def should_stop():
        if end == "exception" and next(calls) == 3:
            raise RuntimeError("out of memory")
        return end == "cancel" and next(calls) == 3

    def run():
        return merge_loras(
            host,
            concepts,
            settings={"schedule": schedule, "micro_batch": 5},
            should_stop=should_stop,
        )

    if end == "success":
        run()
    elif end == "cancel":
        with pytest.raises(MergeCancelled):
            run()
    else:
        with pytest.raises(RuntimeError, match="out of memory"):
            run()
    assert hooks_on(model) == 0
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_an_exception_in_a_paused_forward_unwinds_all_of_them():
    """Every micro-batch's forward is left through its own finally blocks."""
    model, entered, left = Net(), [], []

    class Host(ModuleHost):
        def stages(self, samples, sites):
            for stage in super().stages(samples, sites):

                def run(rows, copies, stage=stage):
                    entered.append(1)
                    try:
                        stage.run(rows, copies)
                    finally:
                        left.append(1)

                yield type(stage)(stage.name, stage.sites, stage.owners, run)

    def tick(what, done, total):
        if done == 2:
            raise KeyboardInterrupt

    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    with pytest.raises(KeyboardInterrupt):
        merge_loras(
            Host(model, make_data(2)),
            concepts,
            settings={"micro_batch": 3},
            on_progress=tick,
            memory_budget=None,  # planning runs a row, too
        )
    assert len(entered) == 4
    assert len(left) == 4
    assert hooks_on(model) == 0


def test_a_site_that_is_never_reached_is_an_error():
    class Half(Net):
        def forward(self, x):
            return self.q(x)

    with pytest.raises(IterisError, match="never reached"):
        merge([make_lora(1), make_lora(2)], model=Half())


def test_residuals_are_what_the_solution_leaves():
    """The report's figures against outputs computed from dense weights."""
    from oracle import captured_inputs, changed

    loras, data, model = [make_lora(1), make_lora(2)], make_data(2), Net()
    for align in ("adapter", "full"):
        ours = merge(loras, data, model, align=align)
        merged = dense_changes(ours.lora)
        final = changed(model, merged)
        for index, lora in enumerate(loras):
            reference = captured_inputs(changed(model, dense_changes(lora)), data[index])
            seen = captured_inputs(final, data[index])
            for site, report in ours.report.sites.items():
                w0 = model.get_submodule(site).weight.detach().flatten(1)
                change = dense_changes(lora)[site]
                if align == "adapter":
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


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": -3},
        {"ridge": -1.0},
        {"ridge": float("nan")},
        {"focus": 1.5},
        {"align": "both"},
        {"micro_batch": 0},
        {"iterations": 0},
        {"nonsense": 1},
    ],
)
def test_settings_out_of_range_are_errors(settings):
    with pytest.raises(IterisError):
        merge([make_lora(1)], **settings)
