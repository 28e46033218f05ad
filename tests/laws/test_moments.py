"""Streamed moments against direct products, and which tokens count."""

import pytest
import torch
from reductions import moments_of
from tiny import random_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.tokens import TokenSampling
from iteris_core.solve.inputs import InputMoments

pytestmark = pytest.mark.usefixtures("unmeasured")


@pytest.mark.parametrize("width", [5, 128, 129, 300, 400])
def test_block_updates_give_the_whole_symmetric_product(width):
    moments = InputMoments(1, width, torch.float64, torch.device("cpu"))
    x = torch.randn(50, width, dtype=torch.float64)
    for piece in x.split(17):
        moments.add(0, piece)
    moments.complete()
    torch.testing.assert_close(moments.own[0], x.mT @ x)
    moments.add(0, x)
    moments.complete()
    torch.testing.assert_close(moments.own[0], 2 * x.mT @ x)
    assert moments.tokens[0] == 100


@pytest.mark.parametrize("width", [8, 12, 300])
def test_the_factor_is_of_the_sum_with_its_ridge(width):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(40, width, generator=generator)
    factor = moments_of([x]).factor([0.5], 1e-3, 1.0, torch.float64)
    own = (x.mT @ x).double()
    wanted = 0.5 * (own + 1e-3 * own.norm() * torch.eye(len(own)))
    lower = factor.lower
    torch.testing.assert_close(lower @ lower.mT, wanted)
    assert float(factor.norms[0]) == pytest.approx(float(own.norm()))


@pytest.mark.parametrize(("ridge", "single"), [(1e-4, True), (1e-6, True), (1e-8, False)])
def test_a_factor_in_single_precision_has_digits(ridge, single):
    """At 1e-8 the factorisation goes through in float32, but what it solves is off by .97."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(256, 256, generator=generator)).Q
    x = (torch.randn(400, 256, generator=generator) * torch.logspace(0, -4, 256)) @ turn
    moment = x.mT @ x
    moment.diagonal().add_(ridge * moment.norm())
    assert int(torch.linalg.cholesky_ex(moment).info) == 0
    inputs = moments_of([x])
    equations = ridge, 1.0, torch.float32
    factor = inputs.factor([1.0], *equations)
    assert inputs.can_use(factor, factor.checks.tolist()) == single
    lower = inputs.factor([1.0], *equations).lower
    assert (lower.dtype == torch.float32) == single
    exact = inputs.factor([1.0], ridge, 1.0, torch.float64).lower
    right = torch.randn(256, 8, dtype=torch.float64, generator=generator)
    solution = torch.cholesky_solve(right, exact)
    gap = torch.cholesky_solve(right.to(lower), lower).double() - solution
    assert gap.norm() <= 0.1 * solution.norm()


def test_a_choice_of_tokens_depends_on_the_row_alone():
    whole = TokenSampling(range(6), lambda width: width, seed=3)
    part = TokenSampling(range(2, 4), lambda width: width, seed=3)
    assert whole.indices(4, width=4) is None
    rows = whole.indices(10, width=4).reshape(6, 4)[2:4] - 20
    assert torch.equal(part.indices(10, width=4).reshape(2, 4), rows)
    assert torch.equal(whole.part(2, 4).indices(10, width=4).reshape(2, 4), rows)
    assert (rows - torch.tensor([[0], [10]])).max() < 10
    assert rows.unique().numel() == 8
    other = TokenSampling(range(6), lambda width: width, seed=4)
    assert not torch.equal(other.indices(10, width=4), whole.indices(10, width=4))


def test_fewer_tokens_change_little_and_micro_batches_nothing(host):
    loras = [
        random_lora(host, s, select=lambda s: "down_blocks.0" in s and "attn" in s) for s in (1, 2)
    ]
    concepts = [Concept(lora, prompts=["a dog", "a cat"]) for lora in loras]
    calibration = Calibration(samples=6, timesteps=2, latents="noise", conditions=0.0)

    def merge(**settings):
        settings = {"ridge": 1e-3, "steps": 0, **settings}
        return merge_loras(host, concepts, settings=settings, calibration=calibration).lora.sites

    def gap(a, b):
        top = sum(float((a[s].dense() - b[s].dense()).square().sum()) for s in a)
        return (top / sum(float(b[s].dense().square().sum()) for s in a)) ** 0.5

    every, some = merge(), merge(row_tokens=32)
    assert 1e-6 < gap(some, every) < 0.5
    assert gap(merge(row_tokens=10_000), every) < 1e-6
    assert gap(merge(row_tokens=32, micro_batch=5), some) < 1e-3
