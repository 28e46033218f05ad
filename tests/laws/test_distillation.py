"""Steps through the whole denoiser: the gradient, what they lower, and what they leave alone."""

from dataclasses import replace
from threading import Event, Thread

import pytest
import torch
from oracle import ModuleHost, changed, dense_changes
from pipelines import PIPELINES, two_concepts
from tiny import random_lora
from torch import nn

from iteris_core import Calibration, Concept, Lora, LowRank, merge_loras
from iteris_core.activations.gradients import constant_weights, saved_tensors
from iteris_core.activations.rows import loads_of
from iteris_core.methods import distillation
from iteris_core.methods.row_gradients import RowGradients
from iteris_core.solve.choose import THRESHOLDS

WIDTH = 12


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
        attended = (self.q(x) @ self.k(x).mT / scale).softmax(-1) @ self.v(x)
        return x + self.out(attended)


class Blocks(nn.Module):
    def __init__(self, kind: type[Attention] = Attention) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(3))
        self.last = nn.Linear(WIDTH, WIDTH)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            # A sharp attention, which no layer's own error tells of.
            x = block(x, scale=0.3).reshape(x.shape)
        return self.last(x)


SITES = [f"blocks.{i}.{name}" for i in range(3) for name in ("q", "k", "v", "out")] + ["last"]


class BlocksHost(ModuleHost):
    strength = 1.0

    def sites(self):
        return {name: self.model.get_submodule(name) for name in SITES}

    def stages(self, samples, sites):
        for stage in super().stages(samples, sites):
            rows = [
                replace(row, loads=loads_of([row.concept], self.strength)) for row in stage.rows
            ]
            yield replace(stage, rows=rows)


def loras_of(count: int = 3) -> list[Lora]:
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        changes = {
            site: LowRank(
                torch.randn(WIDTH, 2, generator=generator, dtype=torch.float64),
                torch.randn(2, WIDTH, generator=generator, dtype=torch.float64) * 0.03,
            )
            for site in SITES
        }
        found.append(Lora(changes, f"lora-{seed}"))
    return found


def data_of(count: int = 3) -> list[torch.Tensor]:
    """24 rows of 12 tokens of each concept, around a mean of its own."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(9 + seed)
        rows = torch.randn(24, 12, WIDTH, generator=generator, dtype=torch.float64)
        found.append(rows + 2 * torch.randn(WIDTH, generator=generator, dtype=torch.float64))
    return found


def merged(model, data, loras, *, strength=1.0, thresholds=THRESHOLDS, budget="free", **settings):
    host = BlocksHost(model, data)
    host.strength = strength
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    how = {"settings": settings, "thresholds": thresholds, "memory_budget": budget}
    result = merge_loras(host, concepts, **how)
    if steps := settings.get("steps"):
        assert result.report.notes["steps"] == [f"model: {steps} taken"]
    return result.lora


def errors(lora: Lora, loras, data, strength: float = 1.0) -> float:
    """Σ over concepts of ‖merged(x) − own(x)‖² / ‖own(x) − base(x)‖², with weights changed."""
    total = 0.0
    with torch.no_grad():
        for one, x in zip(loras, data, strict=True):
            wanted, found = (
                changed(Blocks(), {s: strength * c for s, c in dense_changes(of).items()})(x)
                for of in (one, lora)
            )
            total += float((found - wanted).norm() ** 2 / (wanted - Blocks()(x)).norm() ** 2)
    return total


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_steps_lower_the_error_and_leave_the_base_as_it_was(strength):
    loras, data, model = loras_of(), data_of(), Blocks()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = merged(model, data, loras, strength=strength)
    found = merged(model, data, loras, strength=strength, steps=100)
    assert errors(found, loras, data, strength) < 0.75 * errors(plain, loras, data, strength)
    assert found.ranks == {6}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all("forward" not in vars(module) for module in model.modules())
    for site, change in found.sites.items():
        assert not change.up.requires_grad
        assert not change.down.requires_grad
        assert change.up.dtype == plain.sites[site].up.dtype
        weight = float(model.get_submodule(site).weight.detach().norm())
        together = sum(one.sites[site].squared_norm() for one in loras) ** 0.5
        most = THRESHOLDS.bound * len(loras) ** 0.5 * weight
        assert change.squared_norm() ** 0.5 <= max(1.001 * most, together)


class Ones(dict):
    def get(self, key, default=None):
        return 1.0


class Joining(Attention):
    """Its output has the tokens of all rows in one dimension, so it shows no row's error."""

    def forward(self, x: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
        return super().forward(x, scale).reshape(1, -1, WIDTH)


def test_steps_go_by_final_outputs_where_blocks_join_their_rows():
    loras, data = loras_of(), data_of()
    plain = merged(Blocks(Joining), data, loras)
    found = merged(Blocks(Joining), data, loras, steps=100)
    assert errors(found, loras, data) < 0.75 * errors(plain, loras, data)


@pytest.mark.parametrize(("at_once", "budget"), [(16, "free"), (16, None), (5, "free")])
def test_the_first_gradient_is_that_of_the_whole_model(at_once, budget, monkeypatch):
    """By autograd through dense weights of a copy: of the final outputs, and of each block's.
    Without a budget, blocks run again."""
    loras, data = loras_of(), data_of()
    seen: dict[str, list[torch.Tensor]] = {}

    def step(self, *_):
        seen["factors"] = [group["params"][0] for group in self.param_groups]
        seen["gradients"] = [factor.grad.clone() for factor in seen["factors"]]
        raise KeyboardInterrupt

    rows: list[int] = []
    outputs = RowGradients.add

    def add(self, some, *, first):
        if first:  # no trial
            rows.extend(some)
        self._before = Ones()
        outputs(self, some, first=False)

    def weigh(self, generator):
        self._weights, self._scale = [1.0, 2.0, 3.0] * 24, 2.0**-3

    monkeypatch.setattr(torch.optim.Muon, "step", step)
    monkeypatch.setattr(RowGradients, "add", add)
    monkeypatch.setattr(RowGradients, "weigh", weigh)
    monkeypatch.setattr(distillation, "halved", lambda _: [at_once])
    thresholds = replace(THRESHOLDS, hints=0.5)
    with pytest.raises(KeyboardInterrupt):
        merged(Blocks(), data, loras, thresholds=thresholds, budget=budget, steps=10)
    assert len(rows) == thresholds.batch
    every, weights = torch.cat(data), [1.0, 2.0, 3.0] * 24
    factors = {}
    for site, up, down in zip(SITES_IN_ORDER, *[iter(seen["factors"])] * 2, strict=False):
        factors[site] = up, down
    change = {
        s: (u.double() @ d.double()).detach().requires_grad_() for s, (u, d) in factors.items()
    }

    def streams(changes, x):
        for number in range(3):
            weight = {
                n: Blocks().blocks[number].get_submodule(n).weight
                + changes.get(f"blocks.{number}.{n}", 0.0)
                for n in ("q", "k", "v", "out")
            }
            layer = Blocks().blocks[number]
            q, k, v = (x @ weight[n].mT + getattr(layer, n).bias for n in ("q", "k", "v"))
            x = x + ((q @ k.mT / 0.3).softmax(-1) @ v) @ weight["out"].mT + layer.out.bias
            yield x
        last = Blocks().last
        yield x @ (last.weight + changes.get("last", 0.0)).mT + last.bias

    loss = 0.0
    for row in rows:
        own = dense_changes(loras[row // 24])
        pairs = list(zip(streams(change, every[[row]]), streams(own, every[[row]]), strict=True))
        for number, (found, wanted) in enumerate(pairs):
            share = 1.0 if number == 3 else 0.5 / 3
            loss = loss + share * weights[row] * (found - wanted.detach()).square().sum()
    loss.backward()
    gradients = iter(seen["gradients"])
    for site, (up, down) in factors.items():
        whole = change[site].grad
        for own, wanted in ((next(gradients), whole @ down.double().mT),
                            (next(gradients), up.double().mT @ whole)):  # fmt: skip
            torch.testing.assert_close(own.double(), wanted, rtol=1e-3, atol=1e-4)


SITES_IN_ORDER = sorted(SITES)
"""As a stage lists them."""


@pytest.mark.slow
def test_steps_are_the_same_again_and_can_be_cancelled(host):
    concepts = [Concept(random_lora(host, s), prompts=["a dog", "a cat"]) for s in (1, 2)]
    how = {"settings": {"steps": 3}, "calibration": Calibration(samples=4, timesteps=2)}
    seen: list[tuple[int, int]] = []

    def on_progress(progress):
        if progress.what == distillation.WHAT:
            seen.append((progress.done, progress.total))

    first, second = (
        merge_loras(host, concepts, **how, on_progress=on_progress).lora for _ in range(2)
    )
    assert all(torch.equal(c.up, second.sites[s].up) for s, c in first.sites.items())
    assert seen == [(done, 3) for done in range(4)] * 2
    seen.clear()

    def until_two(progress):
        on_progress(progress)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_loras(host, concepts, **how, on_progress=until_two)
    assert all(p.grad is None for p in host.pipeline.unet.parameters())
    assert all(not m._forward_hooks for m in host.pipeline.unet.modules())
    assert all("forward" not in vars(m) for m in host.pipeline.unet.modules())


class JoiningPairs(Attention):
    """Joins the rows of a pair, and shows each row's error elsewhere."""

    def forward(self, x: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
        made = super().forward(x, scale)
        return made.reshape(1, -1, WIDTH) if len(x) == 2 else made


def test_an_error_of_a_block_is_its_own_where_others_join_their_rows(monkeypatch):
    loras, data, model, seen = loras_of(), data_of(), Blocks(), {}
    model.blocks[0] = JoiningPairs().double()
    model.blocks[0].load_state_dict(Blocks().blocks[0].state_dict())

    def add(self, rows, *, first):
        if first and not seen:
            for some in (rows[:3], rows[3:5]):
                outputs(self, some, first=True)
                seen[len(some)] = dict(self._before)
                self._before.clear()
        outputs(self, rows, first=first)

    outputs = RowGradients.add
    monkeypatch.setattr(RowGradients, "add", add)
    merged(model, data, loras, steps=1)
    assert [block for block, _ in seen[3]] == list(model.blocks)
    assert [block for block, _ in seen[2]] == list(model.blocks)[1:]


def test_effects_in_the_denoiser_that_are_next_to_nothing_do_not_rule(monkeypatch):
    loras, data, weights = loras_of(2), data_of(2), []
    weigh = RowGradients.weigh
    monkeypatch.setattr(
        RowGradients, "weigh", lambda self, g: (weigh(self, g), weights.append(self._weights))
    )
    small = Lora({s: change.scaled(1e-3) for s, change in loras[1].sites.items()}, "small")
    for pair in (loras, [loras[0], small]):
        merged(Blocks(), data, pair, steps=1)
    alike, unlike = (max(of) / min(of) for of in weights)
    assert alike < 2
    assert 7.9 < unlike <= 8.01  # the mean effect is half of the first one's


class InPlace(Attention):
    """Changes a tensor that its gradient needs."""

    def forward(self, x: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
        x = super().forward(x, scale).square()
        x += x.sin()
        return x


def test_steps_wait_for_those_of_another_thread():
    """torch allows changes of saved tensors in one place of a process at a time."""
    loras, data, left, entered = loras_of(), data_of(), Event(), Event()

    def hold():
        with saved_tensors(mutable=True):
            entered.set()
            left.wait(0.5)

    other = Thread(target=hold)
    other.start()
    entered.wait()
    model = Blocks(InPlace)
    assert merged(model, data, loras, steps=2)  # asserts that they are taken
    left.set()
    other.join()


def test_a_row_that_comes_again_needs_no_forward_of_its_lora(monkeypatch):
    """72 rows, 160 visits; with room for three of them, the others run again."""
    loras, data, own = loras_of(), data_of(), []
    outputs = RowGradients._outputs

    def counted(self, rows, copy, **how):
        if how.keys() == {"hints"}:
            own.extend(rows)
        return outputs(self, rows, copy, **how)

    monkeypatch.setattr(RowGradients, "_outputs", counted)
    whole = merged(Blocks(), data, loras, steps=10)
    assert len(own) - len(set(own)) < 10  # the plan's
    own.clear()
    monkeypatch.setattr(distillation.Distillation, "_room", lambda *_: 4 * 3 * 12 * WIDTH * 8)
    found = merged(Blocks(), data, loras, steps=10)
    assert len(own) > 140
    for site, change in whole.sites.items():
        torch.testing.assert_close(found.sites[site].dense(), change.dense())


class Scarce(Attention):
    """Has no memory for gradients of more than four rows."""

    def forward(self, x: torch.Tensor, scale: float = 4.0) -> torch.Tensor:
        if torch.is_grad_enabled() and len(x) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x, scale)


def test_without_memory_fewer_rows_go_at_once():
    loras, data, model = loras_of(), data_of(), Blocks()
    whole = merged(model, data, loras, steps=5)
    model.blocks = nn.ModuleList(Scarce() for _ in range(3)).double()
    model.load_state_dict(Blocks().state_dict())
    found = merged(model, data, loras, steps=5)
    for site, change in whole.sites.items():
        gap = float((found.sites[site].dense() - change.dense()).norm())
        assert gap < 0.01 * change.squared_norm() ** 0.5, site


def test_weights_of_inference_mode_are_replaced_and_put_back():
    with torch.inference_mode():
        model = Blocks()
    before = dict(model.named_parameters())
    with constant_weights(model):
        assert not any(p.is_inference() for p in model.parameters())
        x = torch.ones(1, 2, WIDTH, dtype=torch.float64, requires_grad=True)
        model(x).sum().backward()
        assert x.grad is not None
    assert all(before[name] is p for name, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("name", ["Z-Image", "Wan 2.2 with two experts"])
def test_steps_of_other_architectures(name, tmp_path):
    """Their blocks are found, and come closer."""
    host, concepts = two_concepts(PIPELINES[name](), tmp_path)
    calibration = Calibration(samples=4, timesteps=2, denoising_steps=2)
    plain, found = (
        merge_loras(host, concepts, settings={"steps": steps}, calibration=calibration).lora
        for steps in (0, 10)
    )
    assert any(not torch.equal(c.up, found.sites[s].up) for s, c in plain.sites.items())
    assert all(change.up.isfinite().all() for change in found.sites.values())
