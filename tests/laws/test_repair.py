"""Residual streams in targets and repair, against dense float64 weights. test_gates.py has streams
behind gates, of the same nets."""

from dataclasses import replace

import pytest
import torch
from oracle import ModuleHost, changed, difference
from small_merge import EXACT
from torch import nn
from torch.nn import functional as F

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.errors import IterisError
from iteris_core.solve.choose import THRESHOLDS, Thresholds

WIDTH, RIDGE, LEAST = 8, 1e-4, 0.3


class Plain(nn.Module):
    """Two layers that add to the stream: ``o`` (with LoRAs) and ``f`` (the repair site)."""

    leaves = "of"

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.m, self.o = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.e, self.f = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x, condition):
        x = x + self.o(self.norm1(x).tanh())
        return x + self.f(F.gelu(self.e(self.norm2(x))))


class Net(nn.Module):
    """A row's first token is the condition of its blocks."""

    def __init__(self, block=Plain) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([block(), block()])
        self.double()

    def forward(self, rows):
        condition, x = rows[:, 0], rows[:, 1:]
        for block in self.blocks:
            x = block(x, condition)
        return x

    def order(self) -> list[str]:
        return [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in self.blocks[i].leaves]


class Host(ModuleHost):
    """Without gates it names the streams; behind gates they are found."""

    def sites(self):
        return {site: self.model.get_submodule(site) for site in self.model.order()}

    def streams(self, sites):
        if "m" in self.model.blocks[0].leaves:
            return {}
        norms = {"o": "norm1", "f": "norm2"}
        return {s: self.model.get_submodule(f"{s[:-1]}{norms[s[-1]]}") for s in self.sites()}

    def stages(self, samples, sites):
        for stage in super().stages(samples, sites):
            yield replace(stage, spatial=True) if self.pictures else stage


def make_lora(seed: int, block=Plain) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    net = Net(block)
    shapes = {s: net.get_submodule(s).weight.shape for s in net.order() if s[-1] != "f"}
    return Lora({s: LowRank(make(o, 2), make(2, i) / 3) for s, (o, i) in shapes.items()}, f"{seed}")


def make_data(count: int = 2):
    generator = torch.Generator().manual_seed(9)
    return [
        torch.randn(5, 13, WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)
    ]


def merge(loras, data, model=None, *, pictures=False, thresholds=THRESHOLDS, **settings):
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    host = Host(model or Net(), data)
    host.pictures = pictures
    settings = {**EXACT, **settings}
    return merge_loras(host, concepts, settings=settings, thresholds=thresholds)


def seen_at(model, site, data):
    """The site's inputs, its outputs, the stream that they are added to and its gate, (rows,
    tokens, …)."""
    block, leaf, found = model.get_submodule(site[:-2]), site[-1], {}
    norm = block.norm1 if leaf == "o" else block.norm2
    handles = [
        norm.register_forward_pre_hook(lambda _, args: found.update(stream=args[0])),
        block.m.register_forward_hook(lambda _, args, out: found.update(gates=block.gates(out))),
        model.get_submodule(site).register_forward_hook(
            lambda _, args, out: found.update(x=args[0], y=out)
        ),
    ]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    if leaf == "m":
        return found["x"][:, None], found["y"][:, None], None, None
    gate = found["gates"][leaf == "f"][:, None] if "gates" in found else None
    return found["x"], found["y"], found["stream"], gate


def dense_sweep(loras, data, block=Plain, inputs=slice(None)):
    """The docstring's equation, site by site, with real weights and plain inverses; repair sites
    by those of their inputs that ``inputs`` says."""
    merged = {}
    for site in Net(block).order():
        w0 = Net(block).get_submodule(site).weight.detach()
        some = inputs if site.endswith("f") else slice(None)
        left, right = 0.0, torch.zeros_like(w0[:, some])
        for lora, rows in zip(loras, data, strict=True):
            own = {s: c.dense() for s, c in lora.sites.items()}
            _, y, h, g = seen_at(changed(Net(block), own), site, rows)
            xt, base, ht, gt = seen_at(changed(Net(block), merged), site, rows)
            target = y - base
            if g is not None:
                target = target + behind_gate(block, site, y, h, ht, g, gt)
            elif h is not None:
                target = target + h - ht
            target, xt = target.flatten(0, -2), xt.flatten(0, -2)[:, some]
            gram = xt.mT @ xt
            pull = RIDGE * gram.norm()
            left += (gram + pull * torch.eye(len(gram)).double()) / len(xt)
            toward = own.get(site, torch.zeros_like(w0))[:, some]
            right += (target.mT @ xt + pull * toward) / len(xt)
        merged[site] = torch.zeros_like(w0)
        merged[site][:, some] = right @ torch.linalg.inv(left)
    return merged


def behind_gate(block, site, y, h, ht, g, gt):
    """What the output is to make up for, of a stream to which it is added by a gate."""
    scale = block.scale(Net(block), site, y)
    g, gt = g * scale, gt * scale
    sizes = [(some**2).mean(2, keepdim=True) for some in (ht, y)]
    return (h - ht + (g - gt) * y) * gt / (gt**2 + LEAST**2 * sizes[0] / sizes[1])


@pytest.mark.parametrize(
    ("count", "pictures", "share", "inputs"),
    [
        (2, True, 0.5, slice(None, None, 2)),
        (2, True, 0.25, slice(None, None, 4)),
        (2, False, 0.5, slice(None)),
        (3, True, 0.5, slice(None)),
    ],
)
@pytest.mark.parametrize("tokens", [12, 1], ids=["moments", "rows"])
def test_a_sweep_holds_the_streams_as_the_equation_says(count, pictures, share, inputs, tokens):
    loras = [make_lora(seed) for seed in range(1, count + 1)]
    data = [rows[:2, :2] if tokens == 1 else rows for rows in make_data(count)]
    settings = {"rank": 100, "ridge": RIDGE, "weighting": "tokens", "bound": 0.0}
    settings |= {"thresholds": Thresholds(repair_share=share)}
    ours = merge(loras, data, pictures=pictures, saliency=0.0, **settings)
    assert difference(ours.lora, dense_sweep(loras, data, Plain, inputs)) < 1e-8
    repairs = {s for s, report in ours.report.sites.items() if report.repair}
    assert repairs == {"blocks.0.f", "blocks.1.f"}
    assert "2 sites and 2 that repair drift" in ours.report.summary()
    assert all(r.before == () for r in ours.report.sites.values() if r.repair)


def test_the_sweep_is_the_converged_jacobi_iteration_with_repairs_too():
    loras, data = [make_lora(1), make_lora(2)], make_data()
    settings = {"rank": 3, "ridge": RIDGE, "weighting": "tokens"}
    sweep = merge(loras, data, micro_batch=4, **settings)
    jacobi = merge(loras, data, schedule="jacobi", iterations=5, **settings)
    dense = {site: change.dense() for site, change in jacobi.lora.sites.items()}
    assert difference(sweep.lora, dense) < 1e-7


def final_error(lora, loras, data, block=Plain):
    """Relative squared error of the final output against each LoRA's own."""
    wrong = whole = 0.0
    with torch.no_grad():
        for own, rows in zip(loras, data, strict=True):
            apart, ours = (
                changed(Net(block), {s: c.dense() for s, c in some.sites.items()})(rows)
                for some in (own, lora)
            )
            wrong += float(((ours - apart) ** 2).sum())
            whole += float(((Net(block)(rows) - apart) ** 2).sum())
    return wrong / whole


def test_repair_brings_the_final_output_closer():
    loras, data = [make_lora(i) for i in (1, 2, 3)], make_data(3)
    with_repair, without = (merge(loras, data, repair=on).lora for on in (True, False))
    assert set(without.sites) == set(loras[0].sites)
    assert final_error(with_repair, loras, data) < 0.95 * final_error(without, loras, data)


def test_one_concept_alone_and_align_adapter_have_no_repair_sites():
    lora, data = make_lora(1), make_data()
    assert set(merge([lora], data[:1]).lora.sites) == set(lora.sites)
    adapter = merge([lora, make_lora(2)], data, objective="adapter")
    assert set(adapter.lora.sites) == set(lora.sites)


def test_a_stream_of_another_shape_is_an_error():
    class Wrong(Host):
        def streams(self, sites):
            return {"blocks.0.f": self.model.get_submodule("blocks.0.f")}

    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    with pytest.raises(IterisError, match="residual stream"):
        merge_loras(Wrong(Net(), make_data()), concepts)


def test_prompts_to_preserve_are_no_lora():
    """Two LoRAs and prompts on which the base is to stay are repaired as two LoRAs are."""
    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    host = Host(Net(), make_data(3))
    host.pictures = True
    result = merge_loras(host, [*concepts, Concept.preserve(["unused"])])
    used = result.lora.sites["blocks.0.f"].down.abs().sum(0) > 0
    assert used.tolist() == [True, False] * WIDTH
