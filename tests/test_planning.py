"""The memory budget: what is planned, and that it is kept."""

from __future__ import annotations

import pytest
import torch
from oracle import ModuleHost, Net, make_data, make_lora
from reductions import by_adapter, by_moments
from tiny import random_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.meter import MemoryMeter, free_memory
from iteris_core.activations.processes import ALONE, Processes
from iteris_core.errors import IterisError
from iteris_core.hosts.protocol import Stage
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.passes.budget import Need, RowCost, measure_row, plan_stage, reduction_bytes
from iteris_core.solve.adapter import AdapterMoments
from iteris_core.solve.choose import POLICY
from iteris_core.solve.output import OutputMoments
from iteris_core.solve.problem import Fit

CALIBRATION = Calibration(samples=6, timesteps=3, denoising_steps=3, latents="noise")
MIB = 2**20


def stage_of(owners, ran=None, **more) -> Stage:
    return Stage("denoiser", ["a", "b"], owners, lambda rows, copies: ran.append(rows), **more)


def test_the_meter_counts_what_is_alive():
    kept = torch.zeros(1000)
    with MemoryMeter() as meter:
        kept.view(10, 100).add_(1)
        assert meter.live == 0  # nothing new
        one = torch.ones(1000)
        two = one * 2
        assert meter.live == 8000
        del one, two
        assert meter.live == 0
    assert meter.peak == 8000


def test_a_large_budget_changes_nothing():
    stage = stage_of([0] * 10 + [1] * 10)
    made, kept = plan_stage(Need(stage, RowCost(1, 3), 100, ALONE, True), 10**9, 8)
    assert kept is stage
    assert (made.rows, made.at_once, made.bytes) == (20, 8, 100 + 20 * 1 + 8 * 2)


def test_fewer_rows_at_once_before_rows_are_left_out():
    stage = stage_of([0] * 10 + [1] * 10)
    made, kept = plan_stage(Need(stage, RowCost(1, 3), 100, ALONE, True), 127, 8)
    assert kept is stage
    assert (made.at_once, made.bytes) == (3, 126)


def test_rows_are_left_out_evenly_over_the_concepts():
    ran: list = []
    stage = stage_of([0] * 12 + [1] * 8, ran)
    made, kept = plan_stage(Need(stage, RowCost(1, 3), 100, ALONE, True), 112, 8)
    assert list(kept.owners) == [0] * 5 + [1] * 5
    assert made.bytes <= 112
    assert "10 of 20 rows (the others do not fit)" in str(made)
    kept.run([0, 4, 5, 9], 2)
    assert ran == [[0, 9, 12, 18]]


def test_what_cannot_fit_is_said():
    with pytest.raises(IterisError, match="denoiser needs at least"):
        plan_stage(Need(stage_of([0, 1]), RowCost(1, 3), 100, ALONE, True), 101, 8)
    with pytest.raises(IterisError, match="needs at least"):  # a later stage needs all rows
        plan_stage(Need(stage_of([0] * 9, feeds=True), RowCost(1, 3), 100, ALONE, True), 105, 8)


def test_processes_share_the_rows_that_wait():
    stage = stage_of([0] * 10 + [1] * 10)
    made, _ = plan_stage(Need(stage, RowCost(1, 3), 100, Processes(0, 2), True), 10**9, 8)
    assert made.bytes == 100 + 10 * 1 + 8 * 2


def merge(host, **more):
    concepts = [
        Concept(random_lora(host, seed), trigger=f"sks{seed}", class_word="cat") for seed in (1, 2)
    ]
    return merge_loras(host, concepts, calibration=CALIBRATION, **more)


def test_the_longest_row_is_measured():
    lengths = {"a": [3, 5, 4], "b": [9, 1, 9]}

    def mask(site, rows):
        return torch.arange(9)[None] < torch.tensor([lengths[site][row] for row in rows])[:, None]

    class Runs:
        cast_bytes = 0

        def run(self, batch):
            batch.run()
            batch.observer.observe(None)

    ran = []
    cost = measure_row(stage_of([0, 0, 1], ran, mask=mask), Runs(), 2)
    assert ran == [[2]]  # 4 + 9 tokens
    assert cost == RowCost(0, 0)


@pytest.mark.parametrize(("schedule", "share"), [("sweep", 0.8), ("jacobi", 0.6)])
def test_the_budget_is_kept_and_the_result_is_the_same(host64, schedule, share):
    settings = {"schedule": schedule, "iterations": 2, "statistics": "float64"}
    with MemoryMeter() as meter:
        free = merge(host64, settings=settings, memory_budget=None)
    unbounded = meter.peak
    budget = round(unbounded * share)
    with MemoryMeter() as meter:
        result = merge(host64, settings=settings, memory_budget=budget)
    assert len(result.report.plan) == 2
    assert "do not fit" not in str(result.report.plan)
    assert meter.peak <= 1.1 * budget < unbounded
    for site, change in free.lora.sites.items():
        other = result.lora.sites[site].dense()
        assert (other - change.dense()).norm() <= 1e-4 * change.dense().norm(), site


def test_a_small_budget_leaves_rows_out_and_says_so(host):
    with MemoryMeter() as meter:
        merge(host, memory_budget=None)
    result = merge(host, memory_budget=round(meter.peak * 0.45))
    assert "do not fit" in result.report.summary()
    with pytest.raises(IterisError, match="lower samples, timesteps or latent_size"):
        merge(host, memory_budget=1000)


def test_statistics_of_a_sweep_are_those_of_the_largest_site(host):
    lora = random_lora(host, 1)
    fit = Fit([1.0, 1.0], 1e-6)
    sites = [
        POLICY.bytes(SiteChanges((change, None)), fit, "output", 4, sweep=True)
        for change in lora.sites.values()
    ]
    largest = max(reduction_bytes([site], at_once=False) for site in sites)
    assert reduction_bytes(sites, at_once=False) == largest
    assert reduction_bytes(sites, at_once=True) > largest


@pytest.mark.parametrize(("align", "exact"), [("full", True), ("full", False), ("adapter", True)])
@pytest.mark.parametrize(
    ("out", "width", "count", "rank"),
    [(128, 512, 2, 8), (128, 512, 10, 8), (320, 320, 8, 32), (640, 640, 2, 32), (640, 1280, 2, 16)],
)
def test_the_memory_of_a_solve_is_known(out, width, count, rank, align, exact):
    generator = torch.Generator().manual_seed(0)
    changes, inputs, targets = [], [], []
    for _ in range(count):
        up = torch.randn(out, rank, generator=generator)
        changes.append(LowRank(up, torch.randn(rank, width, generator=generator)))
        inputs.append(torch.randn(2 * width, width, generator=generator))
        targets.append(torch.randn(2 * width, out, generator=generator))
    fit = Fit(
        [1.0] * count,
        1e-5,
        dtype=torch.float64 if exact else torch.float32,
        residuals=exact,
    )
    site = SiteChanges(tuple(changes))
    if align == "adapter":
        reduction, asked = by_adapter(changes, inputs, inputs), AdapterMoments.bytes(site, 4)
    else:
        reduction = by_moments(changes, inputs, targets)
        asked = OutputMoments.bytes(site, 4, None, fit.dtype)
    reduction.inputs.complete()
    with MemoryMeter() as meter:
        reduction.solve(fit)
    assert meter.peak <= 1.1 * asked.solve
    assert asked.solve <= 1.8 * meter.peak


def test_moments_of_earlier_stages_count_where_they_are_kept(host):
    """RegMean solves at the end; its denoiser runs beside the text encoder's moments."""
    concepts = [
        Concept(random_lora(host, seed), trigger=f"sks{seed}", class_word="cat") for seed in (1, 2)
    ]
    with MemoryMeter() as meter:
        merge_loras(host, concepts, "regmean", calibration=CALIBRATION, memory_budget=None)
    budget = round(meter.peak * 0.8)
    with MemoryMeter() as meter:
        merge_loras(host, concepts, "regmean", calibration=CALIBRATION, memory_budget=budget)
    assert meter.peak <= budget


def test_free_memory_is_some():
    assert free_memory(torch.device("cpu")) > MIB


def test_the_longest_row_is_what_the_host_says():
    class Runs:
        cast_bytes = 0

        def run(self, batch):
            batch.run()

    ran = []
    measure_row(stage_of([0, 0, 1], ran, lengths=[3, 9, 4]), Runs(), 2)
    assert ran == [[1]]


def test_rows_that_are_left_take_their_kinds_along():
    stage = stage_of([0] * 4 + [1] * 4, kinds=list("abcdefgh"), lengths=list(range(8)))
    _, kept = plan_stage(Need(stage, RowCost(1, 3), 100, ALONE, True), 106, 8)
    assert list(kept.owners) == [0, 0, 1, 1]
    assert kept.kinds == ["a", "c", "e", "g"]
    assert kept.lengths == [0, 2, 4, 6]


class Roomy(ModuleHost):
    """Has as much room as it is asked for at most, and ``most`` bytes in all."""

    def __init__(self, most: float) -> None:
        super().__init__(Net(), make_data())
        self.most, self.asked = most, []

    def room(self, wanted):
        assert self.copies_seen  # a row has been measured
        self.asked.append(wanted)
        return min(wanted, self.most)


def merge_on(host, budget, **settings):
    concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]
    return merge_loras(host, concepts, settings=settings, memory_budget=budget)


def test_the_host_is_asked_for_what_all_rows_take_and_its_answer_is_kept():
    host = Roomy(float("inf"))
    (line,) = merge_on(host, "free").report.plan
    assert "12 rows, 12 at once" in line
    host = Roomy(host.asked[0] - 1)
    (line,) = merge_on(host, "free").report.plan
    assert "12 rows, 11 at once" in line


def test_a_budget_is_what_the_host_is_asked_for_at_most():
    host = Roomy(float("inf"))
    merge_on(host, None)
    assert not host.asked
    merge_on(host, 10**12)
    (wanted,) = host.asked
    merge_on(host, wanted - 1)
    assert host.asked == [wanted, wanted - 1]


def test_rows_that_are_left_out_are_warned_of(caplog):
    host = Roomy(float("inf"))
    merge_on(host, "free")
    with caplog.at_level("WARNING"):
        result = merge_on(Roomy(host.asked[0] * 0.7), "free", micro_batch=2)
    assert "Not enough memory for all rows: model" in caplog.text
    assert "do not fit" in result.report.summary().splitlines()[1]
    assert result.report.rows < 12  # those that ran
