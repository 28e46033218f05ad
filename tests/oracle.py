"""The paper's equations, transcribed densely in float64, and a host for any small module.

Nothing here uses the code under test except its data types: the models' weights are really
changed, their inputs captured, and each site solved with plain inverses.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from iteris_core import Lora, LowRank
from iteris_core.activations.memory import free_memory, usable
from iteris_core.activations.rows import Row
from iteris_core.hosts.protocol import Host, Stage


class Net(nn.Module):
    """Shared inputs (q, k, v), a residual, a site behind the others, and a convolution."""

    def __init__(self, width: int = 12, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=b) for b in (False, False, True))
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        h = x + self.out((q @ k.mT / 4).softmax(-1) @ v)
        h = h + self.down(F.gelu(self.up(h)))
        return self.conv(h.reshape(h.shape[0], 3, 4, -1)).flatten(1)


SITES = ("q", "k", "v", "out", "up", "down", "conv")


def rows_of(owners) -> list[Row]:
    return [Row(owner, number) for number, owner in enumerate(owners)]


class ModuleHost(Host):
    """Host for a module that takes one tensor; ``data[i]`` is concept i's (rows, …)."""

    pictures = False

    def __init__(self, model: nn.Module, data) -> None:
        self.model = model
        self.data = data
        self.copies_seen: list[int] = []

    def sites(self):
        return {name: self.model.get_submodule(name) for name in SITES}

    def read_lora(self, path):
        raise AssertionError("not used")

    def samples(self, request):
        return self.data

    def forward(self, samples, rows):
        return self.model(torch.cat(list(samples))[list(rows)])

    def streams(self, sites):
        return {}

    def free_memory(self, wanted):
        return usable(free_memory(torch.device("cpu")))

    def stages(self, samples, sites):
        inputs = torch.cat(list(samples))
        owners = [i for i, rows in enumerate(samples) for _ in range(len(rows))]

        def forward(rows, copies):
            self.copies_seen.append(copies)
            self.model(torch.cat([inputs[[row.number for row in rows]]] * copies))

        def final(rows, copy):
            return self.model(inputs[[row.number for row in rows]])

        yield Stage("model", sorted(sites), rows_of(owners), forward, final=final)


def make_lora(seed: int, rank: int = 2, sites=SITES, width: int = 12, size: float = 1.0) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    model = Net(width)
    changes = {}
    for site in sites:
        weight = model.get_submodule(site).weight
        out, fan = weight.shape[0], weight[0].numel()
        up = torch.randn(out, rank, generator=generator, dtype=torch.float64)
        down = torch.randn(rank, fan, generator=generator, dtype=torch.float64)
        kernel = tuple(weight.shape[2:]) or None
        changes[site] = LowRank(up, down * size / (fan * rank) ** 0.5, kernel)
    return Lora(changes, f"lora-{seed}")


def make_data(count: int = 2, rows: int = 6, width: int = 12):
    tokens = 12  # the convolution reads 3 channels of 4 x width
    generator = torch.Generator().manual_seed(99)
    return [
        torch.randn(rows, tokens, width, generator=generator, dtype=torch.float64) * (1 + i)
        + torch.randn(width, generator=generator, dtype=torch.float64)
        for i in range(count)
    ]


def changed(model: nn.Module, changes: dict[str, torch.Tensor]) -> nn.Module:
    """A copy of the model with W0 + ΔW in place; ``changes`` are (out, in) matrices."""
    model = copy.deepcopy(model)
    for site, change in changes.items():
        weight = model.get_submodule(site).weight
        weight.data += change.reshape(weight.shape).to(weight)
    return model


def captured_inputs(model: nn.Module, data: torch.Tensor, sites=SITES) -> dict[str, torch.Tensor]:
    """Every site's inputs as (tokens, in), from a plain run."""
    found: dict[str, torch.Tensor] = {}

    def hook(name):
        def keep(module, args):
            x = args[0]
            if isinstance(module, nn.Conv2d):
                x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                x = x.mT.reshape(-1, x.shape[1])
            found[name] = x.reshape(-1, x.shape[-1]).detach().clone()

        return keep

    handles = [model.get_submodule(s).register_forward_pre_hook(hook(s)) for s in sites]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    return found


def hooks_on(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def dense_changes(lora: Lora | None) -> dict[str, torch.Tensor]:
    return {} if lora is None else {s: c.up @ c.down for s, c in lora.sites.items()}


def balance_weight(kind, change, x, full_output):
    if kind == "tokens":
        return 1.0 / len(x)
    if kind == "adapter":
        return change.norm() ** 2 / (x @ change.mT).norm() ** 2
    if kind == "full":
        return 1.0 / full_output.norm() ** 2
    return 1.0


@torch.no_grad()
def jacobi(
    model,
    loras,
    data,
    *,
    iterations,
    objective,
    ridge,
    weighting,
    rank=None,
    weights=None,
    shrink=1.0,
):
    """Algorithm 1: solve all sites from the last merged model's inputs, ``iterations`` times."""
    deltas = [dense_changes(lora) for lora in loras]
    weights = weights or [1.0] * len(loras)
    sites = [s for s in SITES if any(s in d for d in deltas)]
    references = [captured_inputs(changed(model, d), x) for d, x in zip(deltas, data, strict=True)]
    seen = references
    merged: dict[str, torch.Tensor] = {}
    for _ in range(iterations):
        merged = {}
        for site in sites:
            module = model.get_submodule(site)
            w0 = module.weight.detach().flatten(1)
            left = torch.zeros(w0.shape[1], w0.shape[1], dtype=torch.float64)
            right = torch.zeros_like(w0)
            for delta, xs, mine, weight in zip(deltas, references, seen, weights, strict=True):
                change = delta.get(site, torch.zeros_like(w0))
                x, xt = xs[site], mine[site]
                full = x @ (w0 + change).mT + (0 if module.bias is None else module.bias)
                lam = weight * balance_weight(weighting, change, x, full)
                own, cross = xt.mT @ xt, x.mT @ xt
                eye = torch.eye(len(own), dtype=torch.float64)
                pull = (1 - shrink) * own.diag().diag() + ridge * own.norm() * eye
                left += lam * (shrink * own + pull)
                if objective == "adapter":
                    pull = (1 - shrink) * cross.diag().diag() + ridge * cross.norm() * eye
                    right += lam * change @ (shrink * cross + pull)
                else:
                    target = (w0 + change) @ cross - w0 @ own
                    right += lam * (shrink * target + change @ pull)
            solution = right @ torch.linalg.inv(left)
            if rank is not None:
                solution = truncated(solution, left, rank)
            merged[site] = solution
        seen = [captured_inputs(changed(model, merged), x) for x in data]
    return merged


def truncated(change, moment, rank):
    """Best rank-``rank`` change in ‖(ΔW − ΔW_k) M^{1/2}‖, by the symmetric square root of M."""
    values, vectors = torch.linalg.eigh(moment)
    root = vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.mT)
    u, s, vt = torch.linalg.svd(change @ root, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank] @ torch.linalg.inv(root)


def difference(lora: Lora, dense: dict[str, torch.Tensor]) -> float:
    """The largest relative Frobenius distance over the sites."""
    assert set(lora.sites) == set(dense)
    return max(
        float((lora.sites[s].dense().double() - dense[s].double()).norm() / dense[s].norm())
        for s in dense
    )
