"""The reported time left: with fake clocks, and in real merges."""

import random
import subprocess
import sys

import pytest
import rivals  # noqa: F401 (registers them)
from oracle import ModuleHost, Net, make_data, make_lora
from test_preflight import PictureHost
from tiny import two_concepts

from iteris_core import Calibration, Concept, Progress, merge_loras
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.methods.distillation import WHAT
from iteris_core.progress import OUTLOOK, Forecast


class Watched(Forecast):
    """Gives every step that it reports; its clock shows ``now``."""

    def __init__(self) -> None:
        self.now, self.told = 100.0, list[Progress]()
        super().__init__(self.told.append, lambda: self.now)

    def tick(self, *step) -> Progress:
        super().tick(*step)
        return self.told[-1]


@pytest.mark.parametrize("slower", [0.5, 1.0, 4.0])
def test_what_is_left_takes_as_long_as_what_was_done(slower: float):
    """Steps of very different size, all so much slower than the trial."""
    forecast = Watched()
    sites = [1.0, 20.0, 3.0, 3.0, 40.0, 1.0, 1.0, 30.0]
    forecast.expect("solving sites", sites)
    assert forecast.tick("solving sites", 0, len(sites)).left is None, "nothing was done yet"
    forecast.did(0.5, 0.5)
    assert forecast.left() == pytest.approx(sum(sites))
    for done, site in enumerate(sites, 1):
        forecast.now += slower * site
        progress = forecast.tick("solving sites", done, len(sites))
        if progress.seconds > slower * sum(sites) / 5:
            assert progress.left == pytest.approx(slower * sum(sites[done:]), rel=0.3)
    assert forecast.left() == 0


@pytest.mark.parametrize("overhead", [0.0, 16.0])
@pytest.mark.parametrize("seed", range(5))
def test_after_ten_forwards_the_forecast_is_within_two(overhead: float, seed: int):
    """Of a forward's rows, each takes 1 s, and all together an overhead. A machine that others use
    is now twice as fast and now half; the trial and the first forward take much longer."""
    forecast, noise = Watched(), random.Random(seed)

    def run(seconds: float) -> None:
        forecast.now += seconds * 2 ** noise.uniform(-1, 1)

    forecast.did(1.0, 10 * (overhead + 8) / 8)
    forecast.expect("denoising steps", [500.0])
    forecast.expect("solving sites", [960 / 78] * 78)
    planned = forecast.tick("planning", 0, 0)
    assert planned.time_left.startswith("about")
    forecast.tick("denoising steps", 0, 500)
    forecast.now += 30 * (overhead + 16)
    for done in range(16, 500, 16):
        forecast.tick("denoising steps", done, 500)
        run(overhead + 16)
    forecast.tick("denoising steps", 500, 500)
    forecast.tick("solving sites", 0, 78)
    for done in range(78):
        run(15 * (overhead + 64) / 78)
        forecast.tick("solving sites", done + 1, 78)
    assert planned.left > forecast.now - 100
    for progress in forecast.told[12:-8]:
        left = forecast.now - 100 - progress.seconds
        assert left / 2 <= progress.left <= 2 * left
        assert progress.time_left.startswith("about")


@pytest.mark.slow
def test_on_a_busy_machine_the_forecast_of_the_toybox_is_within_two():
    from toybox import TEMPLATES, concepts, load_pipeline

    host, world, told = DiffusersHost(load_pipeline()), concepts(), list[Progress]()
    merged = [
        Concept(host.read_lora(world[t].lora), trigger=t, class_word=world[t].class_word)
        for t in ("sks1", "sks4")
    ]
    calibration = Calibration(templates=TEMPLATES, samples=8)
    load = "import torch\na = torch.randn(600, 600)\nwhile True: a @ a"
    process = subprocess.Popen([sys.executable, "-c", load])
    try:
        merge_loras(host, merged, calibration=calibration, on_progress=told.append)
    finally:
        process.kill()
        process.wait()
    end = told[-1].seconds
    (planned,) = (progress for progress in told if progress.what == OUTLOOK)
    assert planned.time_left.startswith("about")
    assert "about" not in planned.plan, "one figure for the time"
    counted = [progress for progress in told if progress.what == "denoising steps"]
    ten = counted[10]
    assert (end - ten.seconds) / 2 <= ten.left <= 2 * (end - ten.seconds)


@pytest.mark.slow
def test_while_steps_run_the_forecast_of_the_toybox_is_within_two():
    """From the plan on: steps are most of the work, and none was timed yet. The last fourth of the
    time is a few seconds, where the machine's noise decides."""
    from toybox import TEMPLATES, concepts, load_pipeline

    host, world, told = DiffusersHost(load_pipeline()), concepts(), list[Progress]()
    merged = [
        Concept(host.read_lora(world[t].lora), trigger=t, class_word=world[t].class_word)
        for t in ("sks1", "sks4")
    ]
    calibration = Calibration(templates=TEMPLATES, samples=8)
    how = {"settings": {"steps": 20}, "calibration": calibration, "on_progress": told.append}
    merge_loras(host, merged, **how)
    end = told[-1].seconds
    steps = [progress for progress in told if progress.what == WHAT]
    assert [progress.done for progress in steps] == list(range(21))
    early = [p for p in told if p.seconds <= 0.75 * end and (p.what == OUTLOOK or p in steps)]
    assert len(early) > 5
    for progress in early:
        left = end - progress.seconds
        assert left / 2 <= progress.left <= 2 * left, str(progress)


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
    parts = ["denoising steps", "solving sites", WHAT, "held-out rows"]
    assert list(dict.fromkeys(whats)) == parts
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
        ("regmean", {}),
        ("iteris", {"schedule": "jacobi", "iterations": 3}),
        ("iteris", {"rank": 2, "share_ranks": True}),
        ("iteris", {"steps": 1}),
        ("ties", {}),
    ],
)
def test_every_method_tells_its_time(host, method, settings):
    told: list[Progress] = []
    calibration = {"samples": 2, "timesteps": 1, "denoising_steps": 2}
    merge_loras(
        host,
        two_concepts(host),
        method,
        settings=settings,
        calibration=calibration,
        on_progress=told.append,
    )
    shares = [progress.share for progress in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(progress.left is None or progress.left >= 0 for progress in told)
    if method != "ties":
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
