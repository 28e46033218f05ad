"""IterIS as its authors run it, transcribed densely from the paper (Algorithm 1, eqs. 5 to 8).

Every model's weights are really changed, every site's inputs are stored as matrices, and every site
is solved with one dense system. ``pretrained`` is the authors' code's ``with_pretrain_matrix``: it
puts W0 + ΔW_i for the paper's W_i, in the objective and in λ. Nothing of iteris_core is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Changes = Mapping[str, Tensor]
"""Module name → ΔW, (out, in)"""


@torch.no_grad()
def official(
    model: nn.Module,
    adapters: Sequence[Changes],
    samples: Sequence[Sequence[Mapping[str, Tensor]]],
    *,
    iterations: int,
    alpha: float,
    pretrained: bool,
) -> dict[str, Tensor]:
    """ΔW of the unified adapter; ``samples[i]`` are calls of the model on task i."""
    names = list(adapters[0])
    base = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    tasks = range(len(adapters))
    own = [inputs_of(model, adapters[n], base, samples[n]) for n in tasks]
    seen = own
    weights: list[dict[str, Tensor]] = []
    for n in tasks:
        weights.append(
            {j: (base[j] if pretrained else 0) + adapters[n][j].to(base[j]) for j in names}
        )
    unified: dict[str, Tensor] = {}
    for _ in range(iterations):
        for j in names:
            left, right = 0, 0
            for n in tasks:
                w, x, xt = weights[n][j].double(), own[n][j].double(), seen[n][j].double()
                lam = w.norm() ** 2 / (x @ w.mT).norm() ** 2
                left = left + lam * regularised(xt.mT @ xt, alpha)
                right = right + lam * regularised(xt.mT @ x, alpha) @ w.mT
            solved = torch.linalg.solve(left, right).mT
            unified[j] = solved - base[j].double() if pretrained else solved
        seen = [inputs_of(model, unified, base, samples[n]) for n in tasks]
    return unified


def regularised(gram: Tensor, alpha: float) -> Tensor:
    """Eq. 7"""
    return gram + alpha * gram.norm() * torch.eye(len(gram), dtype=gram.dtype)


def inputs_of(
    model: nn.Module,
    changes: Changes,
    base: Mapping[str, Tensor],
    samples: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Every site's inputs, (tokens, in), with ``changes`` in the weights; restored afterwards."""
    found: dict[str, list[Tensor]] = {name: [] for name in base}
    handles = []
    for name, weight in base.items():
        module = model.get_submodule(name)
        module.weight.data.copy_(weight + changes[name].to(weight))
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, name=name: found[name].append(args[0].flatten(0, -2).clone())
            )
        )
    for call in samples:
        model(**call)
    for handle in handles:
        handle.remove()
    for name, weight in base.items():
        model.get_submodule(name).weight.data.copy_(weight)
    return {name: torch.cat(rows) for name, rows in found.items()}
