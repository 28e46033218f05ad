"""Targets in a few directions of the output give the solve of all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reductions import by_moments, solver_of
from tiny import random_lora, two_concepts

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.collect import SweepCollector
from iteris_core.activations.site import site_of
from iteris_core.activations.token_sampling import TokenSampling
from iteris_core.activations.tokens import Observation
from iteris_core.errors import IterisError
from iteris_core.lora import LowRank, SiteChanges
from iteris_core.solve.choose import POLICY, Policy
from iteris_core.solve.directions import OTHERS
from iteris_core.solve.directions import find_directions as found_directions
from iteris_core.solve.problem import RegressionSpec

OUT, WIDTH, RANK = 60, 40, 3


def find_directions(changes, targets, count):
    return found_directions(SiteChanges.of(changes), targets, count)


class Few(Policy):
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
    for name in ("weighting", "before", "after"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5, abs=1e-6)
    assert found.condition == pytest.approx(wanted.condition)
    assert found.truncated == pytest.approx(wanted.truncated, abs=1e-8)


def test_what_the_directions_leave_out_counts_as_cut_off():
    changes, inputs, targets = problem(noise=3.0, beyond=30)
    wanted = solved(changes, inputs, targets, None)
    directions = find_directions(changes, targets, 12)
    found = solved(changes, inputs, targets, directions)
    assert wanted.truncated > 0.2
    assert found.truncated == pytest.approx(wanted.truncated, abs=0.1)


def test_noise_hardly_moves_the_directions():
    """The error on the fit's own rows is within two hundredths of the solve in all directions."""
    changes, inputs, targets = problem(noise=1.0, beyond=6)
    wanted = solved(changes, inputs, targets, None)
    directions = find_directions(changes, [t[::4] for t in targets], 16)
    found = solved(changes, inputs, targets, directions)
    for ours, best in zip(found.after, wanted.after, strict=True):
        assert ours <= 1.02 * best


@pytest.mark.parametrize("own", [True, False])
def test_directions_are_orthonormal(own):
    changes, _, targets = problem(noise=1.0, dtype=torch.float32)
    if not own:
        zero = LowRank(torch.zeros(OUT, RANK), torch.zeros(RANK, WIDTH))
        changes = [zero, None]
    found = find_directions(changes, targets, 20)
    size = found.matrix.shape[1]
    torch.testing.assert_close(found.matrix.mT @ found.matrix, torch.eye(size))
    assert found.used == 20
    assert found.others_stand_for == (OUT - 20) / 8
    if own:  # the LoRAs' own directions are among them
        for change in changes:
            left = change.up - found.basis @ (found.basis.mT @ change.up)
            assert left.norm() <= 1e-5 * change.up.norm()


def test_a_sample_of_few_tokens_gives_as_many_directions():
    changes, _, targets = problem()
    zero = LowRank(torch.zeros(OUT, RANK), torch.zeros(RANK, WIDTH))
    assert find_directions([zero, zero], [targets[0][:3], targets[1][:0]], 20).used == 3
    assert find_directions(changes, [t[:0] for t in targets], 20).used == 2 * RANK


def test_they_are_taken_where_they_spare_much():
    assert POLICY.directions(1280, 1280, 64) == 96
    assert OTHERS == 8
    assert POLICY.directions(320, 320, 96) is None  # hardly fewer
    assert POLICY.directions(128, 512, 16) is None  # small


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("row_tokens", [None, 9])
def test_a_merge_in_directions_is_the_same_for_any_micro_batch(host64, micro_batch, row_tokens):
    concepts = two_concepts(host64)
    calibration = Calibration(samples=3, timesteps=1, latents="noise", latent_size=4)

    def merge(micro_batch, policy):
        settings = {
            "precision": "float64",
            "ridge": 1e-3,
            "micro_batch": micro_batch,
            "row_tokens": row_tokens,
        }
        return merge_loras(
            host64,
            concepts,
            settings=settings,
            calibration=calibration,
            policy=policy,
        ).lora.sites

    dense = merge(2, POLICY)
    wanted, found = merge(2, Few()), merge(micro_batch, Few())
    for site, change in wanted.items():
        assert (found[site].dense() - change.dense()).norm() <= 1e-5 * change.dense().norm(), site
    assert any(
        (dense[site].dense() - change.dense()).norm() > 1e-5 * change.dense().norm()
        for site, change in wanted.items()
    )


def test_short_texts_are_sampled_where_they_have_tokens():
    """Of rows that are mostly padding as many tokens are drawn as of full ones."""
    module = torch.nn.Linear(4, 70)
    mask = torch.zeros(10, 40, dtype=torch.bool)
    mask[:, :4] = True
    outputs = torch.randn(20, 40, 70)
    shown = Observation(
        "q",
        site_of("q", module),
        inputs=torch.randn(20, 40, 4),
        outputs=outputs,
        rows=10,
        copies=2,
        spans=[(0, 0, 5), (1, 5, 10)],
        group=("", 0),
        alive=set(),
        call=0,
        mask=mask,
        choice=TokenSampling(range(10), None, 0),
    )
    sampled = []

    class Ten(Policy):
        def choose(self, opening, fit, objective, dtype):
            sample = opening.sample

            def look(tokens):
                sampled.extend(sample(tokens))
                return sampled

            return super().choose(replace(opening, sample=look), fit, objective, dtype)

        def directions(self, out, width, rank):
            return 10

    change = LowRank(torch.randn(70, 2), torch.randn(2, 4))
    fit = RegressionSpec([1.0, 1.0], 1e-3)
    collector = SweepCollector(
        {"q": SiteChanges((change, change))},
        solver_of(lambda opening: Ten().choose(opening, fit, "output", torch.float32)),
    )
    collector.observe(shown)
    moments = collector.take("q")
    assert sum(len(rows) for rows in sampled) >= 10
    own = torch.cat([change.up, change.up], dim=1)
    basis = moments.directions.basis
    assert (own - basis @ (basis.mT @ own)).norm() <= 1e-4 * own.norm()
    wanted = (outputs[:5, :4] - outputs[10:15, :4]).flatten(0, 1)
    energy = float(moments.energies[0])
    assert energy == pytest.approx(float(wanted.square().sum()), rel=1e-4)


def test_nan_is_said_where_targets_are_in_directions(host64):
    lora = random_lora(host64, 1)
    site = next(name for name in lora.sites if name.startswith("unet"))
    lora.sites[site].up[0, 0] = float("nan")
    concepts = [
        Concept(lora, None, "sks1", "cat"),
        Concept(random_lora(host64, 2), None, "sks2", "cat"),
    ]
    calibration = Calibration(samples=2, timesteps=1, latents="noise", latent_size=4)
    with pytest.raises(IterisError, match="NaN"):
        merge_loras(host64, concepts, calibration=calibration, policy=Few())
