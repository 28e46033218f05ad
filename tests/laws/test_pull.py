"""The target of the ridge's pull, against a dense oracle."""

from __future__ import annotations

import math

import pytest
import torch
from reductions import by_adapter, by_moments, solved

from iteris_core.lora import LowRank, SiteChanges
from iteris_core.solve.problem import RegressionSpec

OUT, WIDTH, RIDGE = 20, 30, 1e-2
WEIGHTS = [1.0, 0.5, 2.0]


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def changes_of(count: int = 3) -> list[LowRank]:
    return [LowRank(randn(OUT, 3, seed=i), randn(3, WIDTH, seed=10 + i)) for i in range(count)]


def size_of(changes, weights) -> float:
    """τ with dense matrices."""
    dense = [torch.zeros(OUT, WIDTH) if c is None else c.dense() for c in changes]
    pairs = list(zip(weights, dense, strict=True))
    mean = sum(w * d for w, d in pairs) / sum(weights)
    own = sum(w * float(d.square().sum()) for w, d in pairs) / sum(weights)
    return math.sqrt(min(own / float(mean.square().sum()), len(dense)))


def dense_solution(changes, inputs, targets, tau: float) -> torch.Tensor:
    """(Σ λ_i (T_iᵀX_i + ρ_i τ ΔW_i)) (Σ λ_i (X_iᵀX_i + ρ_i I))⁻¹, λ_i = w_i / tokens."""
    left = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    right = torch.zeros(OUT, WIDTH, dtype=torch.float64)
    for change, x, t, weight in zip(changes, inputs, targets, WEIGHTS, strict=True):
        value, gram = weight / len(x), x.mT @ x
        rho = RIDGE * float(gram.norm())
        left += value * (gram + rho * torch.eye(WIDTH))
        right += value * (t.mT @ x)
        if change is not None:
            right += value * rho * tau * change.dense()
    return torch.linalg.solve(left, right.mT).mT


@pytest.mark.parametrize("pull", ["mean", "size"])
@pytest.mark.parametrize("absent", [False, True])
def test_the_ridge_pulls_there(absent, pull):
    changes: list[LowRank | None] = [*changes_of()]
    if absent:
        changes[1] = None
    inputs = [randn(n, WIDTH, seed=20 + n) for n in (9, 7, 5)]
    targets = [randn(n, OUT, seed=30 + n) for n in (9, 7, 5)]
    settings = {"weighting": "tokens", "ridge": RIDGE, "rank": OUT, "pull": pull}
    ours = solved(by_moments(changes, inputs, targets), WEIGHTS, **settings).change.dense()
    tau = 1.0 if pull == "mean" else size_of(changes, WEIGHTS)
    torch.testing.assert_close(ours, dense_solution(changes, inputs, targets, tau))


def test_the_papers_objective_is_pulled_there_as_well():
    changes = changes_of()
    inputs = [randn(n, WIDTH, seed=20 + n) for n in (9, 7, 5)]
    settings = {"weighting": "tokens", "ridge": RIDGE, "pull": "size"}
    ours = solved(by_adapter(changes, inputs, inputs), WEIGHTS, **settings).change.dense()
    targets = [x @ change.dense().mT for x, change in zip(inputs, changes, strict=True)]
    wanted = dense_solution(changes, inputs, targets, size_of(changes, WEIGHTS))
    torch.testing.assert_close(ours, wanted)


def test_like_changes_are_pulled_to_themselves_and_unlike_ones_to_their_size():
    one = changes_of(1)[0]
    fit = RegressionSpec([1.0, 1.0, 1.0, 1.0], RIDGE, pull="size")
    assert fit.pull_of(SiteChanges((one,) * 4)) == pytest.approx(1)
    rows = torch.eye(WIDTH, dtype=torch.float64)
    up = randn(OUT, 2)
    apart = tuple(LowRank(up, rows[2 * i : 2 * i + 2]) for i in range(4))
    assert fit.pull_of(SiteChanges(apart)) == pytest.approx(2)


def test_changes_that_cancel_are_not_blown_up():
    one = changes_of(1)[0]
    fit = RegressionSpec([1.0, 1.0], RIDGE, pull="size")
    assert fit.pull_of(SiteChanges((one, one.scaled(-1.0)))) in (1.0, pytest.approx(2**0.5))
    assert fit.pull_of(SiteChanges((one, one.scaled(-0.99)))) == pytest.approx(2**0.5)
    assert fit.pull_of(SiteChanges((one.scaled(0.0), one.scaled(0.0)))) == 1.0
