"""The solve by rows is the solve by moments, on one site and in whole merges."""

from __future__ import annotations

import pytest
import torch
from tiny import two_concepts

import iteris_core.activations.collect as collector
from iteris_core import Calibration, merge_loras
from iteris_core.errors import SolveError
from iteris_core.lora import LowRank
from iteris_core.solve.moments import InputMoments, SharedInputs, TargetMoments
from iteris_core.solve.rows import SiteRows, rows_are_fewer, solve_rows
from iteris_core.solve.site import solve_site

OUT, WIDTH = 24, 60
SETTINGS = {"balance": "tokens", "ridge": 1e-3}


def problem(counts=(9, 7), out=OUT, width=WIDTH, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    changes = [LowRank(randn(out, 3), randn(3, width)) for _ in counts]
    rows = SiteRows([randn(n, width) for n in counts], [randn(n, out) for n in counts])
    return changes, rows


def by_moments(changes, rows, weights, **settings):
    inputs = SharedInputs([InputMoments(x.mT @ x, None, len(x)) for x in rows.inputs])
    targets = [
        TargetMoments(t.mT @ x, None, t.square().sum(), None, t.dtype)
        for x, t in zip(rows.inputs, rows.targets, strict=True)
    ]
    return solve_site(changes, inputs, targets, weights, align="full", **settings)


@pytest.mark.parametrize("rank", [None, 4, 0.9])
@pytest.mark.parametrize("balance", ["tokens", "none"])
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (300, 320)])
@pytest.mark.parametrize("absent", [False, True])
def test_both_give_the_same(shape, balance, rank, absent):
    changes, rows = problem(out=shape[0], width=shape[1])
    if absent:
        changes[1] = None
    settings = {"balance": balance, "ridge": 1e-3, "rank": rank}
    ours = solve_rows(changes, rows, [1.0, 0.5], **settings)
    wanted = by_moments(changes, rows, [1.0, 0.5], **settings)
    searched = (
        shape[0] == 300 and rank == 4
    )  # a flat spectrum: its leading directions are found about
    gap = (ours.change.dense() - wanted.change.dense()).norm()
    assert gap <= (1e-2 if searched else 1e-8) * wanted.change.dense().norm()
    assert ours.change.rank == wanted.change.rank
    for name in ("balance", "before", "after"):
        assert getattr(ours, name) == pytest.approx(
            getattr(wanted, name), rel=1e-3 if searched else 1e-6
        )
    assert ours.truncated == pytest.approx(wanted.truncated, abs=1e-3 if searched else 1e-8)
    first, second = ours.change.up.norm(dim=0), ours.change.down.norm(dim=1)
    torch.testing.assert_close(first, second)


def test_single_precision_gives_the_same_outputs():
    changes, rows = problem(dtype=torch.float32)
    found = [
        solve_rows(changes, rows, [1.0, 1.0], rank=None, exact=exact, **SETTINGS)
        for exact in (True, False)
    ]
    first, second = (solution.change.dense() for solution in found)
    assert 0 < (first - second).norm() <= 1e-4 * first.norm()


def test_a_ridge_too_small_for_single_precision_is_solved_in_double():
    changes, rows = problem(counts=(30, 30), width=20, dtype=torch.float32)
    settings = {"balance": "none", "ridge": 1e-9, "rank": None}
    found = [solve_rows(changes, rows, [1.0, 1.0], exact=e, **settings) for e in (True, False)]
    torch.testing.assert_close(found[0].change.dense(), found[1].change.dense())


def test_inputs_of_zero_give_the_mean():
    changes, rows = problem()
    rows = SiteRows([torch.zeros_like(x) for x in rows.inputs], rows.targets)
    found = solve_rows(changes, rows, [1.0, 3.0], rank=None, **SETTINGS).change.dense()
    mean = 0.25 * changes[0].dense() + 0.75 * changes[1].dense()
    torch.testing.assert_close(found, mean)


@pytest.mark.parametrize("where", ["inputs", "targets"])
def test_what_is_not_finite_is_said(where):
    changes, rows = problem()
    getattr(rows, where)[1][0, 0] = torch.nan
    with pytest.raises(SolveError, match="NaN"):
        solve_rows(changes, rows, [1.0, 1.0], rank=None, **SETTINGS)


def test_rows_are_kept_where_they_are_few():
    assert rows_are_fewer(512, 1280, 5120)
    assert not rows_are_fewer(5120, 1280, 5120)
    assert not rows_are_fewer(100, 5000, 100)


@pytest.mark.parametrize("micro_batch", [1, 3, 100])
@pytest.mark.parametrize("focus", [0.0, 0.5])
def test_a_merge_by_rows_is_the_merge_by_moments(host64, monkeypatch, micro_batch, focus):
    concepts = two_concepts(host64)
    calibration = Calibration(samples=3, timesteps=1, latents="noise", latent_size=4)
    used = []

    def merge(limit):
        def fewer(tokens, out, width):
            used.append(tokens <= limit)
            return used[-1]

        monkeypatch.setattr(collector, "rows_are_fewer", fewer)
        settings = {
            "statistics": "float64",
            "ridge": 1e-3,
            "micro_batch": micro_batch,
            "focus": focus,
        }
        return merge_loras(host64, concepts, settings=settings, calibration=calibration).lora.sites

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
