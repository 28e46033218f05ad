"""How steps through a denoiser end: the merge is there, and the base is bit by bit as it was."""

import json
from dataclasses import replace

import pytest
import torch
from oracle import hooks_on
from pipelines import PIPELINES
from pipelines import two_concepts as two_of
from tiny import two_concepts

from iteris_core import Calibration, merge_loras
from iteris_core.activations.memory import MemoryMeter
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.methods.distillation import WHAT
from iteris_core.methods.row_gradients import RowGradients
from iteris_core.passes import held_out
from iteris_core.preview import preview_merge
from iteris_core.solve.choose import THRESHOLDS

CALIBRATION = Calibration(samples=4, timesteps=2, denoising_steps=3)
STEPS = 4
BUDGETS = (128, 24, 12, 8)
"""MiB"""


class Trial:
    """Merges on a host, whose denoiser stays as it was."""

    def __init__(self, host) -> None:
        self.host, self.unet = host, host.pipeline.unet
        self._before = [weight.clone() for weight in self.unet.parameters()]

    def merge(self, steps=STEPS, **how):
        how = {"settings": {"steps": steps}, "calibration": CALIBRATION, **how}
        try:
            return merge_loras(self.host, two_concepts(self.host), **how)
        finally:
            assert all(map(torch.equal, self._before, self.unet.parameters()))
            assert all(w.grad is None and w.requires_grad for w in self.unet.parameters())
            assert hooks_on(self.unet) == 0
            assert all("forward" not in vars(module) for module in self.unet.modules())


@pytest.fixture
def trial(host):
    return Trial(host)


def same(one, two) -> bool:
    return all(
        torch.equal(change.up, two.lora.sites[site].up)
        and torch.equal(change.down, two.lora.sites[site].down)
        for site, change in one.lora.sites.items()
    )


def broken_from(monkeypatch, since, error):
    """Gradients of a step fail from the step ``since`` on."""
    add, steps = RowGradients.add, []

    def add_some(self, rows, *, first):
        if first:  # no trial
            steps.append(1)
            if len(steps) > since:
                raise error
        add(self, rows, first=first)

    monkeypatch.setattr(RowGradients, "add", add_some)


@pytest.mark.slow
@pytest.mark.parametrize("since", [0, 2])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), NotImplementedError("no derivative")]
)
def test_what_fails_in_a_step_leaves_those_before_it(trial, monkeypatch, caplog, error, since):
    plain = trial.merge(0)
    broken_from(monkeypatch, since, error)
    result = trial.merge()
    (note, *_) = result.report.notes["steps"]
    assert note.startswith(f"unet: ended after {since} of {STEPS}, ")
    assert str(error) in note
    assert f"ended after {since} of {STEPS}" in caplog.text
    if not since:
        assert same(result, plain)
        assert result.report.settings["steps"] == 0
        assert result.report.kept == plain.report.kept
    assert same(result, plain) == (since == 0 or "left out" in str(result.report.notes["steps"]))


@pytest.mark.slow
def test_gradients_that_are_not_finite_are_tried_smaller_and_then_end_the_steps(
    trial, monkeypatch, caplog
):
    whole, settled, seen = trial.merge(), RowGradients.settled, []

    def settle(self, last):
        seen.append(self._scale)
        return settled(self) and len(seen) not in (2, 3, *range(last, 99))

    monkeypatch.setattr(RowGradients, "settled", lambda self: settle(self, 99))
    assert same(trial.merge(), whole)  # powers of two
    assert len(seen) == STEPS + 2
    assert seen[3] == seen[0] / 2**16
    seen.clear()
    monkeypatch.setattr(RowGradients, "settled", lambda self: settle(self, 5))
    result = trial.merge()
    (note, *_) = result.report.notes["steps"]
    assert note == "unet: ended after 2 of 4, since its gradients are not finite"
    assert "not finite" in caplog.text
    assert all(bool(change.up.isfinite().all()) for change in result.lora.sites.values())


@pytest.mark.slow
def test_half_precision_gradients_neither_vanish_nor_overflow(host, monkeypatch):
    """A float16 base has nearly the gradients of a float32 one."""
    host = DiffusersHost(host.pipeline.to(torch.float16))
    trial, found = Trial(host), []
    settled = RowGradients.settled

    def settle(self):
        finite = settled(self)
        found.append([leaf.grad.clone() for leaf in self.leaves])
        return finite

    monkeypatch.setattr(RowGradients, "settled", settle)
    trial.merge(1)
    assert found


@pytest.mark.slow
def test_the_better_one_is_kept_and_measured_once(trial, monkeypatch):
    """Held-out rows decide: the mean over all LoRAs and uses."""
    plain, asked = trial.merge(0), []
    under = held_out.FinalOutputs.under

    def counted(self, changes, concepts=None):
        asked.append(1)
        return under(self, changes, concepts)

    monkeypatch.setattr(held_out.FinalOutputs, "under", counted)
    worse = trial.merge(thresholds=replace(THRESHOLDS, rate=3.0))
    assert same(worse, plain)
    assert worse.report.kept == plain.report.kept
    assert worse.report.settings["steps"] == 0
    assert "so they are left out" in worse.report.notes["steps"][-1]
    # The base and, under each use, two LoRAs and two merges; the base beside another LoRA
    assert len(asked) == 1 + 4 * 4 + 1
    figures = [{"1": [0.5, 0.9]}, {"1": [0.6, 0.7]}]
    monkeypatch.setattr("iteris_core.merge.kept", lambda job, *versions: figures)
    better = trial.merge()
    told = "held-out rows keep 0.700 with them and 0.650 without, so they are kept"
    assert better.report.notes["steps"] == [f"unet: {STEPS} taken", told]
    assert better.report.kept == figures[0]
    assert better.report.settings["steps"] == STEPS
    assert not same(better, plain)


@pytest.mark.slow
def test_residuals_of_the_closed_form_are_none_of_the_merge_after_steps(trial, monkeypatch):
    figures = [{"1": [0.9, 0.9]}, {"1": [0.6, 0.7]}]
    monkeypatch.setattr("iteris_core.merge.kept", lambda job, *versions: figures[: len(versions)])
    report = trial.merge(calibration=replace(CALIBRATION, samples=12)).report
    of_unet = [s for name, s in report.sites.items() if name.startswith("unet.") and not s.repair]
    assert of_unet
    assert all(site.after == () for site in of_unet)
    assert report.verdict().startswith("Kept on held-out rows")
    closed = trial.merge(0).report
    assert all(site.after for name, site in closed.sites.items() if not site.repair)


@pytest.mark.slow
def test_steps_that_cost_one_lora_much_are_left_out(trial, monkeypatch):
    """Whatever the others gain, and however far below the base a share was without them."""
    figures = [{"1": [0.2, 0.9]}, {"1": [0.6, -40.0]}]
    monkeypatch.setattr("iteris_core.merge.kept", lambda job, *versions: figures[: len(versions)])
    result = trial.merge()
    note = result.report.notes["steps"][-1]
    assert note.startswith("held-out rows keep 0.550 with them and -0.200 without, 0.400 less of ")
    assert note.endswith("so they are left out")
    assert same(result, trial.merge(0))


@pytest.mark.slow
def test_steps_are_taken_in_inference_mode(trial):
    whole = trial.merge()
    with torch.inference_mode():
        result = trial.merge()
    assert result.report.notes["steps"][0] == f"unet: {STEPS} taken"
    assert same(result, whole)


class Stopped(Exception):
    """By which an application cancels."""


def stopping(error, what=WHAT, done=2):
    """Raises once a step is done: Ctrl-C once, an application at everything that follows, too."""
    left = [error]

    def on_progress(progress):
        if progress.what == what and progress.done == done and left:
            raise left.pop() if isinstance(error, KeyboardInterrupt) else error

    return on_progress


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped()])
def test_a_user_who_cancels_gets_the_merge_only_if_asked_for(trial, error):
    with pytest.raises(type(error)):
        trial.merge(on_progress=stopping(error))
    rescued = []
    with pytest.raises(type(error)):
        trial.merge(on_progress=stopping(error), rescue=rescued.append)
    (result,) = rescued
    assert result.report.notes["steps"][0] == f"unet: stopped after 2 of {STEPS}"
    recipe = json.loads(result.lora.metadata["iteris"])["settings"]
    plain = trial.merge(0)
    if isinstance(error, Stopped):  # at once: without steps, and not measured
        assert same(result, plain)
        assert recipe["steps"] == 0
        assert not result.report.kept
    else:
        told = result.report.notes["steps"][-1]
        assert same(result, plain) == ("left out" in told)
        assert recipe["steps"] == (0 if "left out" in told else STEPS)
        partial = json.loads(result.lora.metadata["iteris"]).get("partial")
        assert partial == (None if "left out" in told else f"2 of {STEPS} steps")
        assert result.report.kept.keys() == plain.report.kept.keys()


@pytest.mark.slow
@pytest.mark.parametrize("what", [WHAT, held_out.WHAT])
def test_ctrl_c_while_held_out_rows_are_measured(trial, what):
    """After the last step, and once more after the first one: then without the steps."""
    rescued, first = [], stopping(KeyboardInterrupt()) if what == WHAT else lambda _: None
    second = stopping(KeyboardInterrupt(), held_out.WHAT, 1)

    def on_progress(progress):
        first(progress)
        second(progress)

    with pytest.raises(KeyboardInterrupt):
        trial.merge(on_progress=on_progress, rescue=rescued.append)
    (result,) = rescued
    assert same(result, trial.merge(0)) == (what == WHAT)
    assert result.report.notes[held_out.WHAT] == ["not measured: stopped"]


@pytest.mark.slow
def test_an_interrupt_of_the_application_in_a_forward(trial, monkeypatch):
    monkeypatch.setattr(DiffusersHost, "interrupts", (Stopped,), raising=False)
    broken_from(monkeypatch, 1, Stopped())
    rescued = []
    with pytest.raises(Stopped):
        trial.merge(rescue=rescued.append)
    (result,) = rescued
    assert same(result, trial.merge(0))


@pytest.mark.slow
def test_the_plan_of_the_steps_keeps_the_budget(trial):
    calibration = replace(CALIBRATION, latent_size=16)
    peaks, rows = [], []
    of_stage = "iteris_core.methods.distillation.Distillation._of_stage"
    with pytest.MonkeyPatch.context() as patched:
        from iteris_core.methods.distillation import Distillation

        run = Distillation._of_stage

        def metered(self, *given):
            with MemoryMeter() as meter:
                found = run(self, *given)
            peaks.append((meter.peak, self._fits["unet"]))
            return found

        patched.setattr(of_stage, metered)
        for mib in BUDGETS:
            result = trial.merge(2, calibration=calibration, memory_budget=mib << 20)
            (line,) = (line for line in result.report.plan if "steps" in line)
            fit = peaks[-1][1]
            again = ", blocks run again" * fit.replays
            assert f": {fit.rows} of 16 rows at once{again}, " in line
            assert result.report.notes["steps"][0] == "unet: 2 taken"
    for (peak, fit), mib in zip(peaks, BUDGETS, strict=True):
        assert 0.8 * fit.size < peak <= 1.02 * (mib << 20)  # targets take what is left
        assert fit.size <= mib << 20
        rows.append((fit.rows, fit.replays))
    assert rows[0] == (16, False)
    assert [replays for _, replays in rows] == sorted(replays for _, replays in rows)
    assert rows[-1][1]
    assert rows[-1][0] < rows[-2][0]


@pytest.mark.slow
def test_without_memory_for_a_row_there_are_no_steps(trial, monkeypatch, caplog):
    monkeypatch.setattr(RowGradients, "peak", lambda self, rows: rows << 30)
    how = {"memory_budget": 1 << 29}
    plain, result = trial.merge(0, **how), trial.merge(**how)
    assert same(result, plain)
    assert result.report.settings["steps"] == 0
    (note,) = result.report.notes["steps"]
    assert note.startswith("steps through the unet: left out, one row needs 1 of 0.5 GiB")
    assert note in result.report.plan
    assert "left out" in caplog.text
    assert result.report.summary().splitlines()[1] == (
        f"  Without steps, so less of each LoRA is kept: {note}"
    )
    previewed = preview_merge(
        trial.host,
        two_concepts(trial.host),
        settings={"steps": STEPS},
        calibration=CALIBRATION,
        **how,
    )
    assert previewed.plan == result.report.plan


@pytest.mark.slow
def test_an_older_torch_has_no_steps(trial, monkeypatch):
    plain = trial.merge(0)
    monkeypatch.delattr(torch.optim, "Muon")
    result = trial.merge()
    assert same(result, plain)
    (note,) = result.report.notes["steps"]
    assert "has no Muon; 2.9 and later have it" in note
    assert note in result.report.summary().splitlines()[1]


def test_a_base_of_texts_has_no_steps(trial):
    from oracle import ModuleHost, Net, make_data, make_lora

    from iteris_core import Concept

    class Texts(ModuleHost):
        def stages(self, samples, sites):
            for stage in super().stages(samples, sites):
                yield replace(stage, final=None)

    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    result = merge_loras(Texts(Net(), make_data()), concepts, settings={"steps": 2})
    assert result.report.notes["steps"] == [
        "none, because the LoRAs change no part that gives an image"
    ]


@pytest.mark.slow
def test_two_experts_have_their_steps_in_turn(tmp_path):
    host, concepts = two_of(PIPELINES["Wan 2.2 with two experts"](), tmp_path)
    told = []
    calibration = Calibration(samples=4, timesteps=2, denoising_steps=2)
    result = merge_loras(
        host, concepts, settings={"steps": 2}, calibration=calibration, on_progress=told.append
    )
    counts = [(p.done, p.total) for p in told if p.what == WHAT]
    assert counts == [(0, 4), (1, 4), (2, 4), (2, 4), (3, 4), (4, 4)]
    assert [n for n in result.report.notes["steps"] if n.endswith("taken")] == [
        "transformer: 2 taken", "transformer_2: 2 taken",
    ]  # fmt: skip
    assert sum("steps through" in line for line in result.report.plan) == 2
