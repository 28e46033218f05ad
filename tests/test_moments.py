"""Streamed moments against the products they stand for, and which tokens are counted."""

from __future__ import annotations

import pytest
import torch
from tiny import random_lora

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.activations.tokens import TokenChoice
from iteris_core.hosts.protocol import Stage
from iteris_core.lora import LowRank
from iteris_core.passes.batches import LEAST, PER_INPUT, Batching, micro_batches
from iteris_core.solve.factor import factorise
from iteris_core.solve.moments import (
    InputMoments,
    SharedInputs,
    TargetMoments,
    add_inputs,
    complete,
    new_inputs,
)
from iteris_core.solve.site import solve_site


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


@pytest.mark.parametrize(("ridge", "alike"), [(1e-3, 1e-3), (1e-9, 1e-12)])
def test_a_factor_in_single_precision_is_double_where_it_has_to_be(ridge, alike):
    x = torch.randn(30, 60, generator=torch.Generator().manual_seed(0))  # fewer rows than inputs
    made = {}
    for dtype in (torch.float32, torch.float64):
        inputs = SharedInputs([InputMoments(x.mT @ x, None, 30)])
        (made[dtype],) = factorise([(inputs, [1.0])], ridge, dtype=dtype)
        assert factorise([(inputs, [1.0])], ridge, dtype=dtype)[0] is made[dtype]
    single, double = (factor.cholesky for factor in made.values())
    assert single.dtype == (torch.float32 if ridge == 1e-3 else torch.float64)
    assert (single - double).norm() <= alike * double.norm()


def test_a_solve_in_the_moments_precision_gives_the_same_outputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 300, generator=generator) * torch.logspace(0, -2, 300)
    wanted = torch.randn(400, 300, generator=generator)
    change = LowRank(torch.zeros(300, 8), torch.zeros(8, 300))
    found = {}
    for exact in (True, False):
        target = TargetMoments(
            wanted.mT @ x, None, wanted.square().sum().double(), None, torch.float32
        )
        found[exact] = solve_site(
            [change],
            SharedInputs([InputMoments(x.mT @ x, None, 400)]),
            [target],
            [1.0],
            align="full",
            balance="none",
            ridge=1e-6,
            rank=None,
            exact=exact,
        ).change.dense()
    gap = (found[True] - found[False]) @ x.mT
    assert 0 < gap.norm() <= 1e-3 * (found[True] @ x.mT).norm()


def test_tokens_enough_for_the_inputs_of_a_site():
    def counted(tokens: int, width: int, *, rows: int = 6, places: bool = True, **settings) -> int:
        stage = Stage("denoiser", ["a"], [0] * rows + [1] * rows, lambda *_: None, places=places)
        batch = next(iter(micro_batches(stage, 2, None, Batching(rows, **settings))))
        chosen = batch.choice and batch.choice.indices(tokens, 0, rows, width=width)
        return tokens if chosen is None else len(chosen) // rows

    assert counted(4096, 320, row_tokens="enough") == -(-PER_INPUT * 320 // 6)
    assert counted(4096, 320, rows=100, row_tokens="enough") == LEAST
    assert counted(77, 768, rows=1000, row_tokens="enough") == 77
    assert counted(4096, 320, places=False, row_tokens="enough") == 4096
    assert counted(4096, 320, row_tokens=7, places=False) == 7
    assert counted(4096, 320) == 4096


def test_a_smaller_choice_is_part_of_a_larger():
    choice = TokenChoice([5], lambda width: width, seed=0)
    few, more = (set(choice.indices(100, 0, 1, width=w).tolist()) for w in (10, 30))
    assert few < more


def test_a_choice_of_tokens_depends_on_the_row_alone():
    whole = TokenChoice(range(6), lambda width: width, seed=3)
    part = TokenChoice(range(2, 4), lambda width: width, seed=3)
    assert whole.indices(4, 0, 6, width=4) is None
    rows = whole.indices(10, 2, 4, width=4).reshape(2, 4)
    assert torch.equal(part.indices(10, 0, 2, width=4).reshape(2, 4), rows)
    assert (rows - torch.tensor([[0], [10]])).max() < 10
    assert rows.unique().numel() == 8
    other = TokenChoice(range(6), lambda width: width, seed=4)
    assert not torch.equal(other.indices(10, 0, 6, width=4), whole.indices(10, 0, 6, width=4))


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
