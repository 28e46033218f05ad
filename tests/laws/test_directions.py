"""Targets in a few directions of the output give the solve of all of them."""

import pytest
import torch
from reductions import by_moments
from tiny import random_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.solve.choose import THRESHOLDS, Thresholds
from iteris_core.solve.moments import find_directions as found_directions
from iteris_core.solve.problem import RegressionSpec

pytestmark = pytest.mark.usefixtures("unmeasured")
OUT, WIDTH, RANK = 60, 40, 3


def find_directions(changes, targets, count):
    return found_directions(SiteChanges.of(changes), targets, count)


class Few(Thresholds):
    """Directions at every site, a few more than the rank."""

    def directions(self, out, width, rank):
        return min(out, rank + 4)


def problem(noise=0.0, beyond=2, dtype=torch.float64):
    """Two LoRAs; targets have the directions of their changes, ``beyond`` more, and noise."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    changes = [LowRank(randn(OUT, RANK), randn(RANK, WIDTH)) for _ in range(2)]
    drift = randn(WIDTH, beyond) @ randn(beyond, OUT)
    inputs = [randn(150, WIDTH) for _ in changes]
    targets = [
        x @ (c.dense().mT + drift) + noise * randn(150, OUT)
        for x, c in zip(inputs, changes, strict=True)
    ]
    return changes, inputs, targets


def solved(changes, inputs, targets, directions, ridge=1e-4, weighting="tokens", **settings):
    reduction = by_moments(changes, inputs, targets, weighting, directions)
    return reduction.solve(RegressionSpec([1.0, 0.5], ridge, weighting, **settings))


@pytest.mark.parametrize("rank", [None, 4, 0.99])
@pytest.mark.parametrize(
    "other", [{}, {"shrink": 0.7}, {"ridge": 0.0}, {"weighting": "none", "dtype": torch.float64}]
)
def test_directions_that_hold_all_give_the_same(rank, other):
    changes, inputs, targets = problem()
    if other.get("ridge") == 0.0:  # fewer tokens than inputs: the solve pulls toward the mean
        inputs, targets = [x[:10] for x in inputs], [t[:10] for t in targets]
    wanted = solved(changes, inputs, targets, None, rank=rank, **other)
    directions = find_directions(changes, [t[::7] for t in targets], 2 * RANK + 2)
    assert directions.matrix.shape == (OUT, 2 * RANK + 2 + 8)
    found = solved(changes, inputs, targets, directions, rank=rank, **other)
    rows = torch.cat(inputs)
    outputs = [rows @ solution.change.dense().mT for solution in (found, wanted)]
    assert (outputs[0] - outputs[1]).norm() <= 1e-6 * outputs[1].norm()
    assert found.weighting == pytest.approx(wanted.weighting, rel=1e-5, abs=1e-6)
    torch.testing.assert_close(found.errors, wanted.errors, rtol=1e-5, atol=1e-6)
    assert found.truncated == pytest.approx(wanted.truncated, abs=1e-8)


def test_what_the_directions_leave_out_counts_as_cut_off():
    changes, inputs, targets = problem(noise=3.0, beyond=30)
    wanted = solved(changes, inputs, targets, None)
    directions = find_directions(changes, targets, 12)
    found = solved(changes, inputs, targets, directions)
    assert wanted.truncated > 0.2
    assert found.truncated == pytest.approx(wanted.truncated, abs=0.1)


@pytest.mark.slow
def test_a_merge_in_directions_is_the_same_for_any_micro_batch(host64):
    loras = [random_lora(host64, s, select=lambda s: "down_blocks.0.att" in s) for s in (1, 2)]
    concepts = [Concept(lora, trigger=f"sks{i}") for i, lora in enumerate(loras)]
    calibration = Calibration(samples=3, timesteps=1, latents="noise", latent_size=4)

    def merge(micro_batch, thresholds, row_tokens=None):
        settings = {"precision": "float64", "ridge": 1e-3, "row_tokens": row_tokens}
        found = merge_loras(
            host64, concepts, settings={**settings, "micro_batch": micro_batch},
            calibration=calibration, thresholds=thresholds,
        )  # fmt: skip
        return {site: change.dense() for site, change in found.lora.sites.items()}

    def furthest(found, wanted):
        return max(float((found[s] - w).norm() / w.norm()) for s, w in wanted.items())

    whole, some = merge(2, Few()), merge(2, Few(), 9)
    for size in (1, 100):
        assert furthest(merge(size, Few()), whole) < 1e-5
    assert furthest(merge(3, Few(), 9), some) < 1e-5
    assert furthest(merge(2, THRESHOLDS), whole) > 1e-5
