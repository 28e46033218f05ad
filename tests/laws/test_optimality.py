"""Laws of every least-squares merge: it is where the gradient vanishes, does not depend on how a
change is factorised, and leaves a merged LoRA as it is."""

import math

import pytest
import torch
from oracle import SITES, ModuleHost, Net, make_data, make_lora
from reductions import by_adapter, by_moments, solved
from torch import Tensor

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.lora import SiteChanges
from iteris_core.solve.problem import RegressionSpec

OUT, WIDTH, RIDGE = 6, 8, 1e-2
WEIGHTS = [1.0, 0.5, 2.0]
COUNTS = (9, 7, 5)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def problem(composite: bool = True):
    """Two LoRAs and, last, the sum of both: (changes, inputs, reference inputs, targets)."""
    one, two = (LowRank(randn(OUT, 2, seed=i), randn(2, WIDTH, seed=10 + i)) for i in (1, 2))
    inputs, references, targets = (
        [randn(n, width, seed=seed + n) for n in COUNTS[: 3 if composite else 2]]
        for seed, width in ((20, WIDTH), (40, WIDTH), (60, OUT))
    )
    sums = ((0, 1),) if composite else ()
    return SiteChanges((one, two), sums=sums), inputs, references, targets


def gradient(loss, at: Tensor) -> float:
    """‖∇ loss‖ at a point, relative to its value at zero."""
    sizes = []
    for value in (at, torch.zeros_like(at)):
        point = value.clone().requires_grad_()
        loss(point).backward()
        assert point.grad is not None
        sizes.append(float(point.grad.norm()))
    return sizes[0] / sizes[1]


def size_of(changes: SiteChanges) -> float:
    """By which the mean of two changes is multiplied that the ridge pulls to, with pull="size"."""
    pairs = [(w, c.dense()) for w, c in zip(WEIGHTS, changes, strict=False)]
    total = sum(w for w, _ in pairs)
    mean = sum(w * d for w, d in pairs) / total
    own = sum(w * d.square().sum() for w, d in pairs) / total
    return math.sqrt(min(float(own / mean.square().sum()), 2))


@pytest.mark.parametrize("pull", ["mean", "size"])
def test_the_layers_objective_has_no_slope_at_its_solution(pull):
    changes, inputs, _, targets = problem(composite=pull == "mean")
    weights = WEIGHTS[: len(inputs)]
    tau = 1.0 if pull == "mean" else size_of(changes)

    def loss(change: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for own, x, t, weight in zip(changes, inputs, targets, weights, strict=True):
            rho = RIDGE * (x.mT @ x).norm()
            distance = (t - x @ change.mT).square().sum()
            total = total + weight / len(x) * distance
            total = total + weight / len(x) * rho * (change - tau * own.dense()).square().sum()
        return total

    settings = {"ridge": RIDGE, "rank": OUT, "pull": pull}
    found = solved(by_moments(changes, inputs, targets), weights, **settings)
    assert gradient(loss, found.change.dense()) < 1e-9


@pytest.mark.parametrize("pull", ["mean", "size"])
def test_the_papers_objective_has_no_slope_at_its_solution(pull):
    changes, inputs, references, _ = problem(composite=pull == "mean")
    weights = WEIGHTS[: len(inputs)]
    tau = 1.0 if pull == "mean" else size_of(changes)

    def loss(change: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for own, x, ref, weight in zip(changes, inputs, references, weights, strict=True):
            target = ref @ own.dense().mT
            left, right = RIDGE * (x.mT @ x).norm(), RIDGE * (ref.mT @ x).norm()
            total = total + weight / len(x) * (target - x @ change.mT).square().sum()
            toward = left * change.square() - 2 * right * tau * change * own.dense()
            total = total + weight / len(x) * toward.sum()
        return total

    settings = {"ridge": RIDGE, "rank": OUT, "pull": pull}
    found = solved(by_adapter(changes, inputs, references), weights, **settings)
    assert gradient(loss, found.change.dense()) < 1e-9


def test_the_size_that_the_ridge_pulls_to():
    """Like changes are pulled to themselves, unlike ones to their size, and what cancels is not
    blown up."""

    def pull(*changes: LowRank) -> float:
        fit = RegressionSpec([1.0] * len(changes), RIDGE, pull="size")
        return fit.pull_of(SiteChanges(changes))

    one, rows, up = problem()[0][0], torch.eye(WIDTH, dtype=torch.float64), randn(OUT, 2, seed=0)
    assert pull(*[one] * 4) == pytest.approx(1)
    assert pull(*(LowRank(up, rows[2 * i : 2 * i + 2]) for i in range(4))) == pytest.approx(2)
    assert pull(one, one.scaled(-1.0)) in (1.0, pytest.approx(2**0.5))
    assert pull(one, one.scaled(-0.99)) == pytest.approx(2**0.5)
    assert pull(one.scaled(0.0), one.scaled(0.0)) == 1.0


METHODS = ["iteris", "regmean", "regmean++", "chain-of-merges", "average", "ties", "knots"]


def merged(loras: list[Lora], method: str) -> dict[str, Tensor]:
    host = ModuleHost(Net(), make_data(len(loras)))
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    settings = {"precision": "float64"} if method == "iteris" else {}
    found = merge_loras(host, concepts, method, settings=settings).lora
    return {site: change.dense() for site, change in found.sites.items()}


@pytest.mark.parametrize("method", METHODS)
def test_factors_do_not_matter_only_their_product(method):
    loras = [make_lora(1), make_lora(2, rank=3)]

    def turned(lora: Lora, seed: int) -> Lora:
        """Other factors of the same changes: up R, R⁻¹ down."""
        sites = {}
        for site, change in lora.sites.items():
            matrix = randn(change.rank, change.rank, seed=seed) + 2 * torch.eye(change.rank)
            down = torch.linalg.solve(matrix, change.down)
            sites[site] = LowRank(change.up @ matrix, down, change.kernel)
        return Lora(sites, lora.name)

    ours = merged(loras, method)
    theirs = merged([turned(lora, 5 + i) for i, lora in enumerate(loras)], method)
    for site in SITES:
        gap = float((ours[site] - theirs[site]).norm() / ours[site].norm())
        assert gap < (1e-8 if method in ("iteris", "average", "ties", "knots") else 1e-3), site


@pytest.mark.parametrize("method", ["iteris", "regmean", "regmean++", "chain-of-merges", "average"])
def test_a_merged_lora_merged_with_itself_stays_as_it_is(method):
    first = merged([make_lora(1), make_lora(2)], method)
    kernels = {site: change.kernel for site, change in make_lora(1).sites.items()}
    again = Lora({site: LowRank.whole(dense, kernels[site]) for site, dense in first.items()})
    second = merged([again, again], method)
    for site in SITES:
        gap = float((first[site] - second[site]).norm() / first[site].norm())
        assert gap < (1e-8 if method == "average" else 1e-3), site
