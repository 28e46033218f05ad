"""The reported time left: with fake clocks, and in real merges."""

import pytest
import rivals  # noqa: F401 (registers them)
from oracle import ModuleHost, Net, make_data, make_lora
from test_preflight import PictureHost
from tiny import two_concepts

from iteris_core import Calibration, Concept, Progress, merge_loras
from iteris_core.progress import Forecast


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
        ("regmean", {}),
        ("iteris", {"schedule": "jacobi", "iterations": 3}),
        ("iteris", {"rank": 2, "share_ranks": True}),
        ("iteris", {"block_steps": 1}),
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
