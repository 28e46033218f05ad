"""Streamed moments against the products they stand for, and which tokens are counted."""

from __future__ import annotations

import pytest
import torch
from tiny import random_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.factor import factorise
from iteris_core.moments import InputMoments, SharedInputs, add_inputs, complete, new_inputs
from iteris_core.visit import TokenChoice


@pytest.mark.parametrize("width", [5, 128, 129, 300, 400])
def test_block_updates_give_the_whole_symmetric_product(width):
    moments = new_inputs(width, cross=False, dtype=torch.float64, device=torch.device("cpu"))
    x = torch.randn(50, width, dtype=torch.float64)
    for piece in x.split(17):
        add_inputs(moments, None, piece)
    complete(moments)
    torch.testing.assert_close(moments.own, x.mT @ x)
    add_inputs(moments, None, x)
    complete(moments)
    torch.testing.assert_close(moments.own, 2 * x.mT @ x)
    assert moments.tokens == 100


def test_factors_made_in_a_batch_are_those_made_alone():
    def problem(width: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, width, generator=generator)
        return SharedInputs([InputMoments(x.mT @ x, None, 40)]), [0.5]

    shapes = [(8, 0), (12, 1), (8, 2), (8, 3)]
    together = factorise([problem(*shape) for shape in shapes], 1e-3)
    for shape, factor in zip(shapes, together, strict=True):
        (alone,) = factorise([problem(*shape)], 1e-3)
        torch.testing.assert_close(factor.cholesky, alone.cholesky)
        own = problem(*shape)[0].concepts[0].own.double()
        wanted = 0.5 * (own + 1e-3 * own.norm() * torch.eye(len(own)))
        torch.testing.assert_close(factor.cholesky @ factor.cholesky.mT, wanted)


def test_a_choice_of_tokens_depends_on_the_row_alone():
    whole = TokenChoice(range(6), 4, seed=3)
    part = TokenChoice(range(2, 4), 4, seed=3)
    assert whole.indices(4, 0, 6) is None
    rows = whole.indices(10, 2, 4).reshape(2, 4)
    assert torch.equal(part.indices(10, 0, 2).reshape(2, 4), rows)
    assert (rows - torch.tensor([[0], [10]])).max() < 10
    assert rows.unique().numel() == 8
    other = TokenChoice(range(6), 4, seed=4)
    assert not torch.equal(other.indices(10, 0, 6), whole.indices(10, 0, 6))


def test_fewer_tokens_change_little_and_micro_batches_nothing(host):
    concepts = [Concept(random_lora(host, s), prompts=["a dog", "a cat"]) for s in (1, 2)]
    calibration = Calibration(samples=8, timesteps=2, latents="noise")

    def merge(**settings):
        settings = {"ridge": 1e-3, **settings}
        return merge_loras(host, concepts, settings=settings, calibration=calibration).lora.sites

    def gap(a, b):
        top = sum(float((a[s].dense() - b[s].dense()).square().sum()) for s in a)
        return (top / sum(float(b[s].dense().square().sum()) for s in a)) ** 0.5

    every, some = merge(), merge(row_tokens=32)
    assert 1e-6 < gap(some, every) < 0.5
    assert gap(merge(row_tokens=10_000), every) < 1e-6
    assert gap(merge(row_tokens=32, micro_batch=5), some) < 1e-3
