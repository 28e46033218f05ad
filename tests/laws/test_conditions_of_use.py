"""A merge for how files are used: bounded changes, other strengths, another LoRA beside."""

from dataclasses import replace

import pytest
import torch
from oracle import (
    SITES,
    ModuleHost,
    Net,
    captured_inputs,
    changed,
    dense_changes,
    difference,
    make_data,
    make_lora,
)
from reductions import by_moments, solved
from small_merge import EXACT

from iteris_core import Calibration, Concept, Lora, LowRank, merge_loras
from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.micro_batch import MicroBatch
from iteris_core.activations.rows import Load, Row, loads_of, phantoms
from iteris_core.architectures.sites import weight_energy
from iteris_core.hosts.rows import Use, drawn_uses
from iteris_core.passes.changes import changes_of
from iteris_core.solve.choose import THRESHOLDS

pytestmark = pytest.mark.usefixtures("unmeasured")

LORAS = [make_lora(1), make_lora(2, rank=3)]
OUT, WIDTH = 6, 8


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def flat_problem():
    """Changes, and inputs with hardly any energy in half of the directions."""
    changes = [LowRank(randn(OUT, 2, seed=i), randn(2, WIDTH, seed=10 + i)) for i in (1, 2)]
    scale = torch.tensor([1.0] * 4 + [1e-5] * 4, dtype=torch.float64)
    inputs = [randn(30, WIDTH, seed=20 + i) * scale for i in (1, 2)]
    targets = [randn(30, OUT, seed=30 + i) for i in (1, 2)]
    return changes, inputs, targets


PLAIN = Use()


def merged(loras, data, *, use=PLAIN, thresholds=THRESHOLDS, **settings) -> Lora:
    class Host(ModuleHost):
        def stages(self, samples, sites):
            for stage in super().stages(samples, sites):
                rows = [replace(row, loads=use.of([row.concept])[0]) for row in stage.rows]
                yield replace(stage, rows=rows)

    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    settings = {**EXACT, "bound": 0.0, **settings}
    host = Host(Net(), data)
    return merge_loras(host, concepts, settings=settings, thresholds=thresholds).lora


@pytest.mark.parametrize("bound", [3.0, 10.0])
@pytest.mark.parametrize("rank", [3, OUT])
def test_the_ridge_is_raised_until_a_change_keeps_the_bound(bound, rank):
    changes, inputs, targets = flat_problem()
    settings = {"ridge": 1e-9, "rank": rank}
    free = solved(by_moments(changes, inputs, targets), [1.0, 1.0], **settings)
    size = sum(change.squared_norm() for change in changes) ** 0.5
    assert free.change.squared_norm() ** 0.5 > 100 * size
    kept = solved(by_moments(changes, inputs, targets), [1.0, 1.0], bound=bound * size, **settings)
    assert bound * size / 3 < kept.change.squared_norm() ** 0.5 <= bound * size
    ridges = [1e-9 * 3**power for power in range(20)]
    alike = [
        solved(by_moments(changes, inputs, targets), [1.0, 1.0], ridge=ridge, rank=rank)
        for ridge in ridges
    ]
    first = next(one for one in alike if one.change.squared_norm() ** 0.5 <= bound * size)
    torch.testing.assert_close(kept.change.dense(), first.change.dense(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", ["adapter", "output"])
@pytest.mark.parametrize("schedule", ["sweep", "jacobi"])
@pytest.mark.parametrize("bound", [0.01, 0.6])
def test_a_change_is_at_most_so_many_times_the_layers_weight_or_as_the_loras(
    objective, schedule, bound
):
    settings = {"objective": objective, "schedule": schedule, "iterations": 2}
    changes, net = changes_of([Concept(lora, prompts=["unused"]) for lora in LORAS]), Net()
    over = set()
    for site, free in merged(LORAS, make_data(), **settings).sites.items():
        weight = float(net.get_submodule(site).weight.norm())
        own = sum(c.squared_norm() for c in changes[site].own.values()) ** 0.5
        most = max(1.1 * bound * weight, own)  # norms of weights are within some percent
        if free.squared_norm() ** 0.5 > most:
            over.add(site)
        kept = merged(LORAS, make_data(), **settings, bound=bound).sites[site]
        assert kept.squared_norm() ** 0.5 <= most * (1 + 1e-9)
    assert over, "nothing was to be bounded"


@pytest.mark.parametrize("growth", [0.5, 1.2])
def test_by_default_a_change_grows_to_so_many_times_what_the_loras_have(growth):
    changes = changes_of([Concept(lora, prompts=["unused"]) for lora in LORAS])
    limits = replace(THRESHOLDS, bound=1e6, growth=growth)
    free = merged(LORAS, make_data()).sites
    kept = merged(LORAS, make_data(), thresholds=limits, bound=None).sites
    over = set()
    for site, some in changes.items():
        own = sum(change.squared_norm() for change in some.own.values()) ** 0.5
        most = max(growth, 1.0) * own
        if free[site].squared_norm() ** 0.5 > most:
            over.add(site)
        assert kept[site].squared_norm() ** 0.5 <= most * (1 + 1e-9)
    assert over, "nothing was to be bounded"


def test_where_no_ridge_keeps_the_bound_the_solution_is_scaled():
    changes, inputs, targets = flat_problem()
    size = 1e-3 * changes[0].squared_norm() ** 0.5
    kept = solved(by_moments(changes, inputs, targets), [1.0, 1.0], ridge=0.9, bound=size)
    assert kept.change.squared_norm() ** 0.5 == pytest.approx(size)


class Quantised(torch.nn.Module):
    """A layer whose weight cannot be read."""

    def __init__(self, whole: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = whole.in_features, whole.out_features
        self._run = whole.forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._run(x)


@pytest.mark.parametrize(
    "module",
    [
        torch.nn.Linear(40, 30),
        Quantised(torch.nn.Linear(40, 30)),
        torch.nn.Conv2d(12, 24, 3, padding=1),
        torch.nn.Conv2d(12, 24, 3, padding=1, stride=2, groups=3),
        torch.nn.Conv2d(12, 24, (1, 3), padding=(0, 1)),
        torch.nn.Conv2d(12, 24, 1),
    ],
)
def test_the_norm_of_a_weight_is_measured_by_what_the_layer_makes(module):
    weight = module._run.__self__.weight if isinstance(module, Quantised) else module.weight
    with torch.no_grad():
        found = float(weight_energy(module, weight.new_empty(0))) ** 0.5
    assert found == pytest.approx(float(weight.norm()), rel=0.05)


@pytest.mark.parametrize("strength", [0.6, 1.0, 1.3])
def test_rows_at_a_strength_ask_for_what_each_lora_does_at_it(strength):
    """Site after site by plain least squares, with s ΔW on the weights of both copies."""
    base, data = Net(), make_data()
    ours = merged(LORAS, data, use=Use(strength), ridge=1e-9, weighting="none")

    def at(changes):
        return {site: strength * change for site, change in changes.items()}

    references = [
        captured_inputs(changed(base, at(dense_changes(lora))), x)
        for lora, x in zip(LORAS, data, strict=True)
    ]
    seen = [captured_inputs(changed(base, at(dense_changes(ours))), x) for x in data]
    for site in SITES:
        weight = base.get_submodule(site).weight.detach().flatten(1)
        found = ours.sites[site].dense()
        left = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        right = torch.zeros_like(weight)
        for lora, reference, x in zip(LORAS, references, seen, strict=True):
            own = strength * lora.sites[site].dense()
            target = reference[site] @ (weight + own).mT - x[site] @ weight.mT
            left += strength**2 * x[site].mT @ x[site]
            right += strength * target.mT @ x[site]
        slope = found @ left - right
        # A cut to Σ r_i leaves a slope outside of its outputs.
        within = found @ torch.linalg.pinv(found)
        assert float((within @ slope).norm()) < 1e-5 * float(right.norm()), site


def test_one_lora_in_any_use_stays_as_it_is():
    use = Use(0.7, beside=(Load(0, 0.8, seed=3),))
    found = merged([LORAS[0]], make_data(1), use=use)
    assert difference(found, dense_changes(LORAS[0])) < 1e-5


@pytest.mark.parametrize("conv", [False, True])
def test_a_phantom_has_a_loras_inputs_and_the_size_of_its_effect(conv):
    module = (
        torch.nn.Conv2d(3, 4, 3, padding=1).double() if conv else torch.nn.Linear(5, 4).double()
    )
    out, width = module.weight.flatten(1).shape
    own = LowRank(randn(out, 2, seed=1), randn(2, width, seed=2), (3, 3) if conv else None)
    inputs = randn(2, 3, 6, 6, seed=3) if conv else randn(2, 7, 5, seed=3)
    plain = Row(0, 0, loads=())
    beside = replace(plain, loads=(Load(0, 0.8, seed=9), *loads_of([0], 0.5)))

    def added(rows, copies=1, site="site"):
        """What is added to the layer's outputs."""
        found = []

        def run():
            found.append(module(torch.cat([inputs] * copies)))

        with torch.no_grad(), Lockstep({site: module}, {site: [own]}) as lockstep:
            lockstep.run(MicroBatch(run, rows, copies))
            return found[0] - module(torch.cat([inputs] * copies))

    lora = added([replace(plain, loads=None)] * 2)
    two = added([plain, beside], copies=2)
    torch.testing.assert_close(two[[0, 2]], torch.zeros_like(two[:2]))
    torch.testing.assert_close(two[1], two[3] + 0.5 * lora[1])  # the LoRA is not on in a copy
    torch.testing.assert_close(two[3].abs(), 0.8 * lora[1].abs())
    signs = (two[3] / lora[1]).sign().movedim(0 if conv else -1, 0).flatten(1)
    assert bool((signs == signs[:, :1]).all())  # one for each output
    assert not torch.equal(added([plain, beside], site="another"), added([plain, beside]))


def test_uses_are_drawn_for_a_share_of_each_samples_rows():
    calibration = Calibration(conditions=0.5, seed=3)
    samples = [(owner, sample) for owner in (0, 1) for sample in range(25) for _ in range(4)]
    uses = drawn_uses(samples, [0, 1], calibration)
    plain = [use == Use() for use in uses]
    assert 0.45 < sum(plain) / len(plain) < 0.65
    for sample in set(samples):
        own = {use for of, use in zip(samples, uses, strict=True) if of == sample}
        assert 1 <= len(own - {Use()}) + 1 <= 2
    assert uses == drawn_uses(samples, [0, 1], calibration)
    assert uses != drawn_uses(samples, [0, 1], replace(calibration, seed=4))
    strengths = {strength for use in uses for strength in (use.strength, use.text)}
    assert min(strengths) >= 0.6
    assert max(strengths) <= 1.3
    assert {load.concept for use in uses for load in use.beside} == {0, 1}
    assert any(use != Use() and not use.beside for use in uses)
    assert all(load.seed is not None for use in uses for load in phantoms(use.of([0])[0]))
    assert {*drawn_uses(samples, [0, 1], replace(calibration, conditions=0.0))} == {Use()}
