"""Residual streams in targets and repair, against dense float64 weights."""

from __future__ import annotations

import pytest
import torch
from oracle import ModuleHost, changed, difference
from torch import nn
from torch.nn import functional as F

from iteris_core import Concept, Lora, LowRank, merge_loras
from iteris_core.errors import IterisError

WIDTH = 8


class Block(nn.Module):
    """Two layers that add to the stream: ``o`` (with LoRAs) and ``f`` (the repair site)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.o, self.e = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.f = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.o(self.norm1(x).tanh())
        return x + self.f(F.gelu(self.e(self.norm2(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Block(), Block())
        self.double()

    def forward(self, x):
        return self.blocks(x)


LORA_SITES = ("blocks.0.o", "blocks.1.o")
REPAIRS = ("blocks.0.f", "blocks.1.f")
ORDER = ("blocks.0.o", "blocks.0.f", "blocks.1.o", "blocks.1.f")


class Host(ModuleHost):
    def sites(self):
        return {site: self.model.get_submodule(site) for site in ORDER}

    def streams(self, sites):
        norms = {"o": "norm1", "f": "norm2"}
        return {s: self.model.get_submodule(f"{s[:-1]}{norms[s[-1]]}") for s in ORDER}


def make_lora(seed: int) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return Lora({s: LowRank(make(WIDTH, 2), make(2, WIDTH) / 3) for s in LORA_SITES}, f"l{seed}")


def make_data(count: int = 2):
    generator = torch.Generator().manual_seed(9)
    return [
        torch.randn(5, 12, WIDTH, generator=generator, dtype=torch.float64) for _ in range(count)
    ]


def merge(loras, data, model=None, *, pictures=False, **settings):
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    host = Host(model or Net(), data)
    host.pictures = pictures
    return merge_loras(host, concepts, settings={"precision": "float64", **settings})


def seen_at(model, site, data):
    """The site's inputs, its outputs and the stream that they are added to, (tokens, …)."""
    found = {}
    norm = f"{site[:-1]}{'norm1' if site.endswith('o') else 'norm2'}"
    handles = [
        model.get_submodule(norm).register_forward_pre_hook(
            lambda _, args: found.update(stream=args[0].flatten(0, -2))
        ),
        model.get_submodule(site).register_forward_hook(
            lambda _, args, out: found.update(x=args[0].flatten(0, -2), y=out.flatten(0, -2))
        ),
    ]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    return found["x"], found["y"], found["stream"]


def dense_sweep(loras, data, ridge, inputs=slice(None)):
    """The docstring's equation, site by site, with real weights and plain inverses; repair sites
    by those of their inputs that ``inputs`` says."""
    merged = {}
    for site in ORDER:
        w0 = Net().get_submodule(site).weight.detach()
        some = inputs if site in REPAIRS else slice(None)
        left, right = 0.0, torch.zeros_like(w0[:, some])
        for lora, rows in zip(loras, data, strict=True):
            own = {s: c.dense() for s, c in lora.sites.items()}
            _, y, h = seen_at(changed(Net(), own), site, rows)
            xt, base, ht = seen_at(changed(Net(), merged), site, rows)
            target = y - base + h - ht
            xt = xt[:, some]
            gram = xt.mT @ xt
            pull = ridge * gram.norm()
            left += (gram + pull * torch.eye(len(gram)).double()) / len(xt)
            toward = own.get(site, torch.zeros_like(w0))[:, some]
            right += (target.mT @ xt + pull * toward) / len(xt)
        merged[site] = torch.zeros_like(w0)
        merged[site][:, some] = right @ torch.linalg.inv(left)
    return merged


@pytest.mark.parametrize(
    ("count", "pictures", "share", "inputs"),
    [
        (2, True, None, slice(None, None, 2)),  # half for two concepts in pictures
        (2, True, 1.0, slice(None)),
        (2, False, None, slice(None)),
        (2, False, 0.25, slice(None, None, 4)),
        (3, True, None, slice(None)),
    ],
)
@pytest.mark.parametrize("tokens", [12, 1], ids=["moments", "rows"])
def test_a_sweep_holds_the_streams_as_the_equation_says(count, pictures, share, inputs, tokens):
    loras = [make_lora(seed) for seed in range(1, count + 1)]
    data = [rows[:2, :tokens] if tokens == 1 else rows for rows in make_data(count)]
    ours = merge(
        loras,
        data,
        rank=100,
        ridge=1e-4,
        weighting="tokens",
        pictures=pictures,
        repair_inputs=share,
    )
    assert difference(ours.lora, dense_sweep(loras, data, 1e-4, inputs)) < 1e-8
    assert {s for s, report in ours.report.sites.items() if report.repair} == set(REPAIRS)
    assert "2 sites and 2 that repair drift" in ours.report.summary()
    assert all(r.before == () for r in ours.report.sites.values() if r.repair)


def test_the_sweep_is_the_converged_jacobi_iteration_with_repairs_too():
    loras, data = [make_lora(1), make_lora(2)], make_data()
    sweep = merge(loras, data, rank=3, ridge=1e-4, weighting="tokens", micro_batch=4)
    jacobi = merge(
        loras, data, rank=3, ridge=1e-4, weighting="tokens", schedule="jacobi", iterations=5
    )
    dense = {site: change.dense() for site, change in jacobi.lora.sites.items()}
    assert difference(sweep.lora, dense) < 1e-7


def final_error(lora, loras, data):
    """Relative squared error of the final output against each LoRA's own."""
    wrong = whole = 0.0
    with torch.no_grad():
        for own, rows in zip(loras, data, strict=True):
            apart = changed(Net(), {s: c.dense() for s, c in own.sites.items()})(rows)
            base = Net()(rows)
            ours = changed(Net(), {s: c.dense() for s, c in lora.sites.items()})(rows)
            wrong += float(((ours - apart) ** 2).sum())
            whole += float(((base - apart) ** 2).sum())
    return wrong / whole


def test_repair_brings_the_final_output_closer():
    loras, data = [make_lora(i) for i in (1, 2, 3)], make_data(3)
    with_repair = merge(loras, data).lora
    without = merge(loras, data, repair=False).lora
    assert set(without.sites) == set(LORA_SITES)
    assert final_error(with_repair, loras, data) < 0.95 * final_error(without, loras, data)


def test_one_concept_alone_and_align_adapter_have_no_repair_sites():
    data = make_data()
    assert set(merge([make_lora(1)], data[:1]).lora.sites) == set(LORA_SITES)
    adapter = merge([make_lora(1), make_lora(2)], data, objective="adapter")
    assert set(adapter.lora.sites) == set(LORA_SITES)


def test_a_stream_of_another_shape_is_an_error():
    class Wrong(Host):
        def streams(self, sites):
            return {"blocks.0.f": self.model.get_submodule("blocks.0.f")}

    concepts = [Concept(make_lora(i), prompts=["unused"]) for i in (1, 2)]
    with pytest.raises(IterisError, match="residual stream"):
        merge_loras(Wrong(Net(), make_data()), concepts)


def test_prompts_to_preserve_are_no_lora():
    """Two LoRAs and prompts on which the base is to stay are repaired as two LoRAs are."""
    loras, data = [make_lora(1), make_lora(2)], make_data(3)
    concepts = [Concept(lora, prompts=["unused"]) for lora in loras]
    host = Host(Net(), data)
    host.pictures = True
    result = merge_loras(host, [*concepts, Concept.preserve(["unused"])])
    used = result.lora.sites["blocks.0.f"].down.abs().sum(0) > 0
    assert used.tolist() == [True, False] * WIDTH
