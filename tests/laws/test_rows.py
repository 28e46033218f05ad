"""The solve by rows is the solve by moments, on one site and in whole merges."""

from __future__ import annotations

import pytest
import torch
from reductions import by_moments, by_rows, solved
from tiny import two_concepts

from iteris_core import Calibration, Runtime, merge_loras
from iteris_core.errors import SolveError
from iteris_core.lora import LowRank
from iteris_core.solve.choose import POLICY, Policy

OUT, WIDTH = 24, 60
SETTINGS = {"weighting": "tokens", "ridge": 1e-3}


def problem(counts=(9, 7), out=OUT, width=WIDTH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    changes = [LowRank(randn(out, 3), randn(3, width)) for _ in counts]
    return changes, [randn(n, width) for n in counts], [randn(n, out) for n in counts]


@pytest.mark.parametrize("rank", [None, 4, 0.9])
@pytest.mark.parametrize("weighting", ["tokens", "none"])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (300, 320)])
@pytest.mark.parametrize("absent", [False, True])
def test_both_give_the_same(shape, weighting, rank, absent):
    changes, inputs, targets = problem(out=shape[0], width=shape[1])
    if absent:
        changes[1] = None
    settings = {"weighting": weighting, "ridge": 1e-3, "rank": rank}
    ours = solved(by_rows(changes, inputs, targets), [1.0, 0.5], **settings)
    wanted = solved(by_moments(changes, inputs, targets, weighting), [1.0, 0.5], **settings)
    searched = (
        shape[0] == 300 and rank == 4
    )  # a flat spectrum: its leading directions are found about
    gap = (ours.change.dense() - wanted.change.dense()).norm()
    assert gap <= (1e-2 if searched else 1e-8) * wanted.change.dense().norm()
    assert ours.change.rank == wanted.change.rank
    for name in ("weighting", "before", "after"):
        assert getattr(ours, name) == pytest.approx(
            getattr(wanted, name), rel=1e-3 if searched else 1e-6
        )
    assert ours.truncated == pytest.approx(wanted.truncated, abs=1e-3 if searched else 1e-8)
    first, second = ours.change.up.norm(dim=0), ours.change.down.norm(dim=1)
    torch.testing.assert_close(first, second)


def test_single_precision_gives_the_same_outputs():
    reduction = by_rows(*problem(dtype=torch.float32))
    found = [
        solved(reduction, [1.0, 1.0], rank=None, dtype=dtype, **SETTINGS)
        for dtype in (torch.float64, torch.float32)
    ]
    first, second = (solution.change.dense() for solution in found)
    assert 0 < (first - second).norm() <= 1e-4 * first.norm()


def test_a_ridge_too_small_for_single_precision_is_solved_in_double():
    reduction = by_rows(*problem(counts=(30, 30), width=20, dtype=torch.float32))
    settings = {"weighting": "none", "ridge": 1e-9, "rank": None}
    found = [
        solved(reduction, [1.0, 1.0], dtype=dtype, **settings)
        for dtype in (torch.float64, torch.float32)
    ]
    torch.testing.assert_close(found[0].change.dense(), found[1].change.dense())


def test_inputs_of_zero_give_the_mean():
    changes, inputs, targets = problem()
    reduction = by_rows(changes, [torch.zeros_like(x) for x in inputs], targets)
    found = solved(reduction, [1.0, 3.0], rank=None, **SETTINGS).change.dense()
    mean = 0.25 * changes[0].dense() + 0.75 * changes[1].dense()
    torch.testing.assert_close(found, mean)


@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_what_is_not_finite_is_said(where):
    changes, inputs, targets = problem()
    (inputs if where == "inputs" else targets)[1][0, 0] = torch.nan
    with pytest.raises(SolveError, match="NaN"):
        solved(by_rows(changes, inputs, targets), [1.0, 1.0], rank=None, **SETTINGS)


def test_rows_are_kept_where_they_are_few():
    assert POLICY.rows_are_fewer(512, 1280, 5120)
    assert not POLICY.rows_are_fewer(5120, 1280, 5120)
    assert not POLICY.rows_are_fewer(100, 5000, 100)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("saliency", [0.0, 0.5])
def test_a_merge_by_rows_is_the_merge_by_moments(host64, micro_batch, saliency):
    concepts = two_concepts(host64)
    calibration = Calibration(samples=3, timesteps=1, latents="noise", latent_size=4)
    used = []

    class UpTo(Policy):
        def rows_are_fewer(self, tokens, out, width):
            used.append(tokens <= self.limit)
            return used[-1]

    def merge(limit):
        policy = UpTo()
        object.__setattr__(policy, "limit", limit)
        settings = {
            "precision": "float64",
            "ridge": 1e-3,
            "micro_batch": micro_batch,
            "saliency": saliency,
        }
        return merge_loras(
            host64,
            concepts,
            settings=settings,
            calibration=calibration,
            runtime=Runtime(policy=policy),
        ).lora.sites

    wanted = merge(-1)
    assert not any(used)
    for limit in (10**9, 50):  # all of them; those of few tokens
        used.clear()
        found = merge(limit)
        assert any(used)
        assert all(used) == (limit > 50)
        for site, change in wanted.items():
            gap = (found[site].dense() - change.dense()).norm()
            assert gap <= 1e-5 * change.dense().norm(), site
