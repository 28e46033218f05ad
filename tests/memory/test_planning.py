"""The memory budget: plans, and that merges stay within them."""

from dataclasses import replace

import pytest
import torch
from oracle import ModuleHost, Net, make_data, make_lora, rows_of
from reductions import by_adapter, by_moments
from small_merge import GUIDED
from tiny import make_pipeline, random_lora, two_concepts

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.memory import MemoryMeter, free_memory
from iteris_core.errors import OutOfMemory
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.protocol import Stage
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.passes.changes import changes_of
from iteris_core.passes.footprint import (
    ON_DEVICE,
    Footprint,
    Measure,
    Step,
    Strategy,
)
from iteris_core.passes.job import Job, StageTiming, Trace
from iteris_core.passes.planner import IN_HOST, plan_stage
from iteris_core.solve.moments import AdapterMoments, OutputMoments
from iteris_core.solve.problem import MemoryEstimate, RegressionSpec

CALIBRATION = Calibration(samples=6, timesteps=3, denoising_steps=3, latents="noise")
CPU = torch.device("cpu")
OFFLOADED = Strategy(IN_HOST, 1.4, offloads=CPU)


def stage_of(owners, ran=None, **more) -> Stage:
    rows = rows_of(owners)
    return Stage("denoiser", ["a", "b"], rows, lambda rows, copies: ran.append(rows), **more)


STEPS = [Step("a", 1, 3), Step("", 0, 0)]
"""Of a row that waits at one site."""


def needs_of(stage, *others) -> list[Footprint]:
    """On the device, and with ``others``."""
    need = Footprint(stage, ON_DEVICE, STEPS, {"a": MemoryEstimate(0, 0)}, 100, 0)
    return [need, *(replace(need, strategy=other) for other in others)]


def test_rows_wait_in_host_memory_before_any_is_left_out():
    stage = stage_of([0] * 10 + [1] * 10)
    needs = needs_of(stage, OFFLOADED)
    made = plan_stage(needs, 130, 8, 10**9)
    assert made.strategy == ON_DEVICE  # fewer at once takes no longer here
    made = plan_stage(needs, 112, 8, 10**9)
    assert made.stage is stage
    assert (made.strategy, made.at_once, made.bytes, made.host_bytes) == (OFFLOADED, 4, 112, 20)
    made = plan_stage(needs, 112, 8, 8)
    assert (made.strategy, made.rows) == (ON_DEVICE, 10)


def test_what_cannot_fit_is_said():
    with pytest.raises(OutOfMemory, match=r"needs at least .* GiB beyond the model for one row"):
        plan_stage(needs_of(stage_of([0, 1])), 101, 8)
    with pytest.raises(OutOfMemory, match="needs at least"):  # a later stage needs all rows
        plan_stage(needs_of(stage_of([0] * 9, feeds_next=True)), 105, 8)
    needs = needs_of(stage_of([0, 1]), OFFLOADED)
    with pytest.raises(OutOfMemory, match=r"host memory.* lower samples, timesteps or latent_size"):
        plan_stage(needs, 102, 8, 10**9)


def merge(host, **more):
    concepts = [
        Concept(random_lora(host, seed), trigger=f"sks{seed}", class_word="cat") for seed in (1, 2)
    ]
    return merge_loras(host, concepts, calibration=CALIBRATION, **more)


@pytest.mark.parametrize(
    ("schedule", "share"), [("sweep", 0.8), pytest.param("jacobi", 0.6, marks=pytest.mark.slow)]
)
def test_the_budget_is_kept_and_the_result_is_the_same(host64, schedule, share):
    settings = {"schedule": schedule, "iterations": 2, "precision": "float64", "steps": 0}
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


@pytest.mark.slow
@pytest.mark.parametrize("mib", [6, 12])
def test_denoising_and_held_out_rows_keep_the_limit_as_the_sweep_does(host, mib):
    concepts = two_concepts(host)
    with MemoryMeter() as meter:
        result = merge_loras(host, concepts, calibration=GUIDED, memory_budget=mib << 20)
    assert meter.peak <= 1.05 * (mib << 20)
    assert result.report.kept


def test_as_many_rows_run_as_fit_beside_the_rest():
    def timing(**taken):
        return StageTiming(stage_of([0]), CALIBRATION, {}, 0.0, CPU, Step("", **taken))

    seen = (timing(running=10, forward=5), timing(running=1, forward=70))
    factors = {"a": SiteChanges((LowRank(torch.zeros(3, 1), torch.zeros(1, 2)),))}  # 20 bytes
    job = Job(
        None,
        [],
        factors,
        CALIBRATION,
        None,
        lambda *_: None,
        memory_budget=100,
        trace=Trace(stages=seen),
    )
    assert (job.at_once(16), job.at_once(4), job.at_once(16, 2)) == (9, 4, 4)
    assert (job.at_once(16, factors=1), job.at_once(16, factors=3)) == (7, 1)
    assert replace(job, memory_budget=None).at_once(16) == 16
    assert replace(job, trace=Trace()).at_once(16) == 16
    roomy = Roomy(50)
    roomy.copies_seen.append(1)
    assert replace(job, memory_budget="free", host=roomy).at_once(16) == 1
    assert roomy.asked == [165]


@pytest.mark.parametrize(
    ("objective", "exact"), [("output", True), ("output", False), ("adapter", True)]
)
@pytest.mark.parametrize(
    ("out", "width", "count", "rank"), [(128, 512, 10, 8), (320, 320, 8, 32), (640, 1280, 2, 16)]
)
def test_the_memory_of_a_solve_is_known(out, width, count, rank, objective, exact):
    generator = torch.Generator().manual_seed(0)
    changes, inputs, targets = [], [], []
    for _ in range(count):
        up = torch.randn(out, rank, generator=generator)
        changes.append(LowRank(up, torch.randn(rank, width, generator=generator)))
        inputs.append(torch.randn(2 * width, width, generator=generator))
        targets.append(torch.randn(2 * width, out, generator=generator))
    fit = RegressionSpec(
        [1.0] * count, 1e-5, dtype=torch.float64 if exact else torch.float32, residuals=exact
    )
    site = SiteChanges(tuple(changes))
    if objective == "adapter":
        reduction, asked = by_adapter(changes, inputs, inputs), AdapterMoments.bytes(site, 4)
    else:
        reduction = by_moments(changes, inputs, targets)
        asked = OutputMoments.bytes(site, 4, None, fit.dtype)
    reduction.inputs.complete()
    with MemoryMeter() as meter:
        reduction.solve(fit)
    assert meter.peak <= 1.1 * asked.solve
    assert asked.solve <= 1.8 * meter.peak


class Roomy(ModuleHost):
    """Has as much room as it is asked for at most, and ``most`` bytes in all."""

    def __init__(self, most: float) -> None:
        super().__init__(Net(), make_data())
        self.most, self.asked = most, []

    def free_memory(self, wanted):
        assert self.copies_seen  # a row has been measured
        self.asked.append(wanted)
        self.forwards_at_last = len(self.copies_seen)
        return min(wanted, self.most)


def merge_on(host, budget, **settings):
    concepts = [Concept(make_lora(seed), prompts=["unused"]) for seed in (1, 2)]
    return merge_loras(host, concepts, settings=settings, memory_budget=budget)


def test_the_host_is_asked_for_what_all_rows_take_and_its_answer_is_kept(caplog):
    host = Roomy(float("inf"))
    (line,) = merge_on(host, "free").report.plan
    assert "12 rows, 12 at once" in line
    (wanted,) = host.asked
    (line,) = merge_on(Roomy(wanted - 1), "free").report.plan
    assert "12 rows, 11 at once" in line
    # What a plan leaves is for the model again, before the rows run.
    host = Roomy(0.6 * wanted)
    merge_on(host, "free")
    first, last = host.asked
    assert last < 0.6 * wanted < first == wanted
    assert host.forwards_at_last < len(host.copies_seen)
    with caplog.at_level("WARNING"):
        result = merge_on(Roomy(0.3 * wanted), "free", micro_batch=2)
    assert "Not enough memory for all rows: model" in caplog.text
    assert "do not fit" in result.report.summary().splitlines()[1]
    assert result.report.rows < 12  # those that ran
    with pytest.raises(OutOfMemory, match="lower samples, timesteps or latent_size"):
        merge_on(host, 1000)


class Offload:
    """Weights of a whole model come to the device when it is called, and leave when the pipeline
    frees its hooks, as with ``enable_model_cpu_offload``; here they are copied."""

    def __init__(self, pipeline) -> None:
        self.there: set[str] = set()
        pipeline._all_hooks = ["…"]
        pipeline.maybe_free_model_hooks = self.there.clear
        for name in ("unet", "text_encoder"):
            model = getattr(pipeline, name)
            model.register_forward_pre_hook(lambda model, _, name=name: self.bring(model, name))

    def bring(self, model, name) -> None:
        if name not in self.there:
            self.there.add(name)
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()


def test_weights_that_are_offloaded_are_no_part_of_a_row():
    def measured(offloaded: bool) -> list[Step]:
        pipeline = make_pipeline()
        if offloaded:
            Offload(pipeline)
        host = DiffusersHost(pipeline)
        concepts = [Concept(random_lora(host, seed), prompts=["a cat"]) for seed in (1, 2)]
        generator = torch.Generator().manual_seed(0)
        changes = changes_of(concepts)
        job = Job(host, concepts, changes, CALIBRATION, generator, lambda *_: None)
        with job.run() as run:
            *_, (stage, steps) = (
                (stage, Measure(stage, run.lockstep, 2).row()) for stage in run.stages()
            )
        assert stage.name == "unet"
        return steps

    assert measured(True) == measured(False)


def test_free_memory_of_an_xpu_is_its_own(monkeypatch):
    """A card that this machine need not have answers with what torch asks it."""
    known = {"mem_get_info": (1000, 4000), "memory_reserved": 300, "memory_allocated": 100}
    for name, value in known.items():
        monkeypatch.setattr(torch.xpu, name, lambda device, value=value: value)
    assert free_memory(torch.device("xpu", 0)) == 1200

    def refused(device):
        raise RuntimeError("doesn't support querying the available free memory")

    monkeypatch.setattr(torch.xpu, "mem_get_info", refused)
    assert free_memory(torch.device("xpu", 0)) > 2**20
