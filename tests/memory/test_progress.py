"""The reported time left: with fake clocks, and in real merges."""

from __future__ import annotations

import pytest
import rivals  # noqa: F401 (registers them)
import torch
from oracle import ModuleHost, Net, make_data, make_lora
from test_preflight import PictureHost
from tiny import random_lora, two_concepts

from iteris_core import Calibration, Concept, LowRank, Progress, merge_loras
from iteris_core.hosts.protocol import Stage
from iteris_core.lora import SiteChanges
from iteris_core.passes.batches import ExecutionConfig
from iteris_core.passes.eta import FORWARDS, SITES, Eta, Passes, Reached, Seen
from iteris_core.progress import Forecast, duration


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Watched(Forecast):
    """Gives every step that it reports."""

    def __init__(self, clock: Clock) -> None:
        self.told: list[Progress] = []
        super().__init__(self.told.append, clock)

    def tick(self, *step) -> Progress:
        super().tick(*step)
        return self.told[-1]


@pytest.mark.parametrize("slower", [0.5, 1.0, 4.0])
def test_what_is_measured_corrects_what_was_expected(clock: Clock, slower: float):
    """Sites of very different size, every kind of work so much slower than expected."""
    forecast = Watched(clock)
    sites = [(float(size), 10.0 / size) for size in (1, 20, 3, 3, 40, 1, 1, 30)]
    for kind in range(2):
        forecast.expect(kind, {site: parts[kind] for site, parts in enumerate(sites)})
    assert forecast.left() == pytest.approx(sum(map(sum, sites)))
    whole = slower * sum(a for a, _ in sites) + 2 * slower * sum(b for _, b in sites)
    forecast.mark()
    for site, (first, second) in enumerate(sites):
        clock.now += slower * first
        forecast.spent(0, site)
        clock.now += 2 * slower * second
        forecast.spent(1, site)
        progress = forecast.tick("solving sites", site + 1, len(sites))
        if progress.seconds > whole / 10 and site + 1 < len(sites):
            assert progress.left == pytest.approx(whole - progress.seconds, rel=0.3)
    assert forecast.left() is None, "nothing is expected any more"


def test_a_phase_is_measured_by_its_count(clock: Clock):
    """Denoising takes thrice as long as expected, and so will forwards behind it."""
    forecast = Watched(clock)
    forecast.expect("denoising steps", {"": 10.0}, "forwards")
    forecast.expect("sites", {"a": 10.0}, "forwards")
    shares: list[float] = []
    for step in range(1, 31):
        clock.now += 1.0
        progress = forecast.tick("denoising steps", step, 30)
        shares.append(progress.share)
        if step > 3:
            assert progress.left == pytest.approx(60 - step, rel=0.3)
    assert progress.left == pytest.approx(30.0, rel=0.06)
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.5, abs=0.02)
    forecast.tick("solving sites", 0, 4)
    left = forecast.left()
    assert left == pytest.approx(30.0, rel=0.06), "what a phase had left is not there any more"


def test_what_is_not_known_is_not_told(clock: Clock):
    forecast = Watched(clock)
    forecast.expect("stages", {"": 1.0}, known=False)
    clock.now += 5
    assert forecast.tick("generating", 1, 4).left is None
    forecast.drop("stages")
    forecast.expect("forwards", {"a": 1.0, "b": 3.0}, known=False)
    forecast.mark()
    assert forecast.tick("solving sites", 0, 2).left is None
    clock.now += 2
    forecast.spent("forwards", "a")
    assert forecast.tick("solving sites", 1, 2).left == pytest.approx(6.0)


def test_all_that_there_is_may_be_one_count(clock: Clock):
    """A merge of weights: nothing was expected."""
    forecast = Watched(clock)
    for site in range(1, 5):
        clock.now += 2.0
        progress = forecast.tick("merging sites", site, 4)
    assert progress.seconds == 8
    forecast = Watched(clock)
    forecast.tick("drawing", 0, 4)
    clock.now += 2.0
    assert forecast.tick("drawing", 1, 4).left == pytest.approx(6.0)


def test_it_is_told_in_words():
    assert str(Progress("solving sites", 3, 9, left=170.0)) == (
        "solving sites 3 of 9, about 3 min left"
    )
    assert str(Progress("loading the base", 0, 1)) == "loading the base"
    assert str(Progress("plan: unet: 4 rows", left=20.0)) == "plan: unet: 4 rows, about 20 s left"
    assert [duration(s) for s in (0.2, 89, 95, 5300, 7200)] == [
        "1 s", "89 s", "2 min", "88 min", "2.0 h",
    ]  # fmt: skip


def test_kinds_of_a_family_are_as_much_slower(clock: Clock):
    """Forwards of a stage to come take as much longer as those of the one before."""
    forecast = Watched(clock)
    for stage, seconds in (("text", 10.0), ("unet", 30.0)):
        forecast.expect(("forwards", stage), {"a": seconds, "b": seconds}, "forwards")
    forecast.mark()
    clock.now += 20.0
    forecast.spent(("forwards", "text"), "a")
    assert forecast.left() == pytest.approx(20.0 + 120.0, rel=0.03)


def test_a_site_weighs_by_its_shapes(clock: Clock):
    """A stage of two rows, of which a forward takes ten seconds: of a site four times as wide four
    times as much; moments of inputs that a site before has are not made again."""
    eta = Eta(clock=clock)
    changes = {
        name: SiteChanges((LowRank(torch.ones(out, 1), torch.ones(1, 64)),))
        for name, out in (("a", 64), ("b", 256), ("c", 64))
    }
    stage = Stage("unet", list(changes), [0, 0], lambda rows, copies: None)
    eta.expect(Passes(changes, ExecutionConfig(2)), 0)
    reached = {name: Reached(some.shape, 50, name == "c") for name, some in changes.items()}
    eta.measured(Seen(stage, reached, 10.0))
    assert eta.forecast.left() == pytest.approx(2 * 2 * 10.0, rel=0.05)
    eta.begin(stage, 1.5)
    assert eta.forecast.left() == pytest.approx(1.5 * 2 * 2 * 10.0, rel=0.05)
    eta.begin(stage, 1.0)
    parts = {kind: eta.forecast._kinds[kind, "unet"].parts for kind in (FORWARDS, SITES)}
    assert parts[FORWARDS][0, "b"] == pytest.approx(4 * parts[FORWARDS][0, "a"])
    assert parts[SITES][0, "c"] < parts[SITES][0, "a"] <= parts[SITES][0, "b"]
    clock.now += 7.0
    eta.done(FORWARDS, stage, (0, "a"))
    assert eta.forecast._kinds[FORWARDS, "unet"].took == 7.0


def test_a_second_sweep_is_expected_from_the_start(clock: Clock):
    """Of two rounds the first leaves as much as it takes itself; what it took corrects the rest."""
    changes = {"a": SiteChanges((LowRank(torch.ones(64, 1), torch.ones(1, 64)),))}
    stage = Stage("unet", ["a"], [0, 0], lambda rows, copies: None)
    passes = Passes(changes, ExecutionConfig(2))
    left: dict[int, list[float]] = {}
    for rounds in (1, 2):
        eta = Eta(clock=clock, rounds=rounds)
        left[rounds] = []
        for turn in range(rounds):
            eta.expect(passes, 0)
            if not turn:
                eta.measured(Seen(stage, {"a": Reached((64, 64), 50)}, 10.0))
            eta.begin(stage, 1.0)
            left[rounds].append(eta.forecast.left() or 0.0)
            clock.now += 60.0  # half as long again as expected
            eta.done(FORWARDS, stage, (0, "a"))
            eta.done(SITES, stage, (0, "a"))
            left[rounds].append(eta.forecast.left() or 0.0)
    assert left[1] == pytest.approx([40.0, 0.0], rel=0.02)
    assert left[2] == pytest.approx([80.0, 60.0, 60.0, 0.0], rel=0.02)


def test_every_step_of_a_merge_is_told(host):
    """The count of each thing goes up, the share never goes back, and the time left is there from
    the first steps of denoising on."""
    told: list[Progress] = []
    merge_loras(
        host,
        two_concepts(host),
        calibration=Calibration(samples=3, timesteps=2, denoising_steps=4),
        on_progress=told.append,
    )
    whats = [progress.what for progress in told if progress.total]
    assert list(dict.fromkeys(whats)) == ["denoising steps", "solving sites", "held-out rows"]
    for what in dict.fromkeys(whats):
        some = [progress for progress in told if progress.what == what]
        counts = [progress.done for progress in some]
        assert counts == sorted(counts)
        assert counts[-1] == some[-1].total
    assert any(progress.plan.startswith("unet") for progress in told)
    shares = [progress.share for progress in told]
    assert shares == sorted(shares)
    *before, last, end = told
    from_denoising = before[[p.what for p in before].index("denoising steps") + 1 :]
    assert all(progress.left is not None for progress in from_denoising)
    assert (end.what, end.done, end.total) == (last.what, last.done, last.total)
    assert (end.share, end.left, end.time_left) == (1.0, 0.0, "")


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ssr", {}),
        ("regmean", {}),
        ("regmean++", {}),
        ("iteris-subspace", {}),
        ("chain-of-merges", {}),
        ("gradient-fusion", {}),
        ("loraclr", {}),
        ("iteris", {"schedule": "jacobi", "iterations": 3}),
        ("iteris", {"objective": "adapter"}),
        ("iteris", {"rank": 2, "share_ranks": True}),
        ("iteris", {"block_steps": 3}),
        ("custom-diffusion", {}),
        ("ties", {}),
    ],
)
def test_every_method_tells_its_time(host, method, settings):
    told: list[Progress] = []
    calibration = {"samples": 3, "timesteps": 2, "denoising_steps": 3}
    concepts = [
        Concept(random_lora(host, seed), trigger=f"sks{seed}", class_word="cat") for seed in (1, 2)
    ]
    merge_loras(
        host,
        concepts,
        method,
        settings={**settings, **({"micro_batch": 4} if "micro_batch" in settings else {})},
        calibration=calibration,
        on_progress=told.append,
    )
    shares = [progress.share for progress in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(progress.left is None or progress.left >= 0 for progress in told)
    if method not in ("ties", "custom-diffusion"):
        assert sum(progress.left is not None for progress in told) > len(told) // 2


def test_a_merge_is_cancelled_at_every_step():
    told: list[Progress] = []
    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    for host in (ModuleHost(Net(), make_data()), PictureHost(Net(), make_data())):
        told.clear()
        merge_loras(host, concepts, on_progress=told.append)
        for stop in range(len(told) - 1):

            def on_progress(_, left=iter(range(stop))):  # noqa: B008
                if next(left, None) is None:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                merge_loras(host, concepts, on_progress=on_progress)
