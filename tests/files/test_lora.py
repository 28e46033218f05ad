"""Low-rank algebra: properties that hold for any factors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import truncated

from iteris_core.errors import IterisError
from iteris_core.linalg import truncate_factors, truncate_matrix
from iteris_core.lora import LowRank, concatenate

sizes = st.integers(1, 9)


def draw_change(out, fan, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    return LowRank(up, torch.randn(rank, fan, generator=generator, dtype=torch.float64))


def draw_moment(width, seed):
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(2 * width + 3, width, generator=generator, dtype=torch.float64)
    x = x * torch.logspace(0, -2, width, dtype=torch.float64)
    return x.mT @ x


@given(sizes, sizes, sizes, sizes, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_sums_norms_and_truncations(out, fan, rank, keep, seed):
    a, b = draw_change(out, fan, rank, seed), draw_change(out, fan, rank + 1, seed + 7)
    total = concatenate([a, b])
    assert torch.allclose(total.dense(), a.dense() + b.dense())
    assert total.squared_norm() == pytest.approx(float(total.dense().norm() ** 2), rel=1e-9)
    cut, lost = truncate_factors(total, keep)
    u, s, vt = torch.linalg.svd(total.dense(), full_matrices=False)
    best = (u[:, :keep] * s[:keep]) @ vt[:keep]
    assert torch.allclose(cut.dense(), best, atol=1e-9)
    assert cut.rank <= keep
    assert lost == pytest.approx(float((s[keep:] ** 2).sum() / (s**2).sum()), abs=1e-9)


@given(sizes, sizes, sizes, sizes, st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_weighted_truncation_is_the_best_in_the_metric(out, fan, rank, keep, seed):
    change, moment = draw_change(out, fan, rank, seed), draw_moment(fan, seed)
    chol = torch.linalg.cholesky(moment)
    keep = min(keep, out, fan)
    cut, _ = truncate_factors(change, keep, chol)
    dense_cut, _ = truncate_matrix(change.dense() @ moment, keep, chol, like=change)
    best = truncated(change.dense(), moment, keep)

    def error(approximation):
        return float(((change.dense() - approximation) @ chol).norm())

    scale = float((change.dense() @ chol).norm())
    assert error(cut.dense()) == pytest.approx(error(best), abs=1e-7 * scale)
    assert error(dense_cut.dense()) == pytest.approx(error(best), abs=1e-7 * scale)
    plain, _ = truncate_factors(change, keep)
    assert error(cut.dense()) <= error(plain.dense()) + 1e-9 * scale


def test_the_randomised_svd_of_a_large_site_is_nearly_exact():
    torch.manual_seed(0)
    signal = torch.randn(600, 20, dtype=torch.float64) @ torch.randn(20, 700, dtype=torch.float64)
    weighted = signal + 0.05 * torch.randn(600, 700, dtype=torch.float64)
    like = LowRank(torch.ones(1, 1), torch.ones(1, 1)).to(torch.float64)
    before = torch.get_rng_state()
    cut, lost = truncate_matrix(weighted, 16, like=like)
    assert torch.equal(before, torch.get_rng_state())
    s = torch.linalg.svdvals(weighted)
    best = float((s[16:] ** 2).sum())
    assert float((weighted - cut.dense()).norm() ** 2) < 1.0001 * best
    assert lost == pytest.approx(best / float((s**2).sum()), rel=1e-4)


def test_factors_of_a_weighted_cut_are_of_one_size():
    change, moment = draw_change(8, 9, 4, 3), 1e8 * draw_moment(9, 3)
    cut, _ = truncate_factors(change, 2, torch.linalg.cholesky(moment))
    assert float(cut.up.norm()) == pytest.approx(float(cut.down.norm()))


def test_factors_that_do_not_fit_are_an_error():
    with pytest.raises(IterisError, match="do not form a product"):
        LowRank(torch.ones(3, 2), torch.ones(4, 3))
    with pytest.raises(IterisError, match="differ in shape"):
        concatenate([draw_change(2, 3, 1, 0), draw_change(3, 3, 1, 0)])


@given(sizes, sizes, sizes, st.floats(0.05, 0.99), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_a_share_of_energy_is_kept_at_the_least_rank(out, fan, rank, share, seed):
    change, moment = draw_change(out, fan, rank, seed), draw_moment(fan, seed)
    for metric in (None, torch.linalg.cholesky(moment)):
        weighted = change.dense() if metric is None else change.dense() @ metric
        whole = weighted if metric is None else weighted @ metric.mT
        squares = torch.linalg.svdvals(weighted) ** 2
        for cut, lost in (
            truncate_factors(change, share, metric),
            truncate_matrix(whole, share, metric, like=change),
        ):
            off = change.dense() - cut.dense()
            off = off if metric is None else off @ metric
            assert lost == pytest.approx(float((off**2).sum() / squares.sum()), abs=1e-9)
            assert lost <= 1 - share + 1e-9
            fewer = float(squares[: cut.rank - 1].sum() / squares.sum())
            assert fewer < share + 1e-9
