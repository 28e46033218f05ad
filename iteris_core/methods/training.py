"""Adam steps on merged changes: the trained factors, and the training loop.

:mod:`.block_polish` defines the rows and targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.meter import is_out_of_memory
from ..errors import IterisError, brief
from ..linalg.whitening import Whitening
from ..lora import LowRank

STEP = 3.0
"""The time of a step in forwards: one, plus two for the gradients."""


class NoGradients(IterisError):
    """The factors do not reach the loss, or reach it through operations without gradients."""


@dataclass(frozen=True)
class Factors:
    """Up and down factors by site, as float32 leaves. With ``whitenings``, down factors are those
    for whitened inputs (:mod:`..linalg.whitening`), so a step of a given size moves a site's output
    about equally in every direction."""

    ups: Mapping[str, Tensor]
    downs: Mapping[str, Tensor]
    kernels: Mapping[str, Any]
    whitenings: Mapping[str, Whitening]

    @classmethod
    def white(
        cls, merged: Mapping[str, LowRank], tokens: Mapping[str, Tensor], floor: float
    ) -> Factors:
        """The factors of the sites whose inputs, (tokens, in), are given; up and down have equal
        norm."""
        ups: dict[str, Tensor] = {}
        downs: dict[str, Tensor] = {}
        whitenings = {site: Whitening.of(some, floor) for site, some in tokens.items()}
        for site, whitening in whitenings.items():
            change = merged[site].to(torch.float32, whitening.roots.device)
            up, across = torch.linalg.qr(change.up)
            left, values, right = torch.linalg.svd(
                across @ whitening.root(change.down), full_matrices=False
            )
            root = values.sqrt()
            ups[site] = (up @ left * root).detach().requires_grad_()
            downs[site] = (root[:, None] * right).detach().requires_grad_()
        return cls(ups, downs, {site: merged[site].kernel for site in tokens}, whitenings)

    @property
    def all(self) -> list[Tensor]:
        return [*self.ups.values(), *self.downs.values()]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups of an optimiser: each factor at ``rate`` times the root mean square of
        its entries."""
        return [
            {"params": [factor], "lr": rate * float(factor.detach().square().mean().sqrt())}
            for factor in self.all
        ]

    def put(self, lockstep: Lockstep) -> None:
        """Install the factors as merged changes, with gradients if enabled."""
        for site, kernel in self.kernels.items():
            up, down = self.ups[site], self.downs[site]
            if site in self.whitenings:
                down = self.whitenings[site].inverse_root(down)
            if not torch.is_grad_enabled():
                up, down = up.detach(), down.detach()
            lockstep.merged[site] = LowRank(up, down, kernel)


@dataclass(frozen=True)
class Steps:
    """``count`` steps; step i uses ``falls(i)`` times a factor's rate. The error is checked every
    ``checked_every`` steps, and at the end."""

    count: int
    falls: Callable[[int], float]
    checked_every: int


def train(
    groups: Sequence[dict[str, Any]],
    steps: Steps,
    loss: Callable[[], Tensor],
    error: Callable[[], float],
    least: float,
    tick: Callable[[int], None],
) -> bool:
    """Run the steps; returns True if ``error()`` fell below ``least``, its initial value. The
    factors in ``groups`` (optimiser groups with ``params`` and ``lr``) are then the best ones,
    otherwise unchanged.

    ``loss()`` draws a random batch; ``tick`` gets the number of steps done. Raises
    :class:`NoGradients` if a step is impossible.
    """
    factors = [factor for group in groups for factor in group["params"]]
    best, gained = [factor.detach().clone() for factor in factors], False
    adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, steps.falls)
    for step in range(1, steps.count + 1):
        with torch.enable_grad():
            gradients = _gradients(loss(), factors)
        for factor, gradient in zip(factors, gradients, strict=True):
            factor.grad = gradient
        adam.step()
        schedule.step()
        if step % steps.checked_every == 0 or step == steps.count:
            with torch.no_grad():
                now = error()
            if now < least:
                least, gained = now, True
                best = [factor.detach().clone() for factor in factors]
        tick(step)
    with torch.no_grad():
        for factor, kept in zip(factors, best, strict=True):
            factor.copy_(kept)
    return gained


def _gradients(loss: Tensor, factors: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """The gradients of ``factors``; None for a site that does not reach the loss, such as a text
    encoder's last layers."""
    found: list[Tensor | None] = []
    try:
        if loss.requires_grad:
            found += torch.autograd.grad(loss, factors, allow_unused=True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise NoGradients(brief(error)) from error
    if all(gradient is None for gradient in found):
        raise NoGradients("no change reaches the compared output")
    return found


def trained(lockstep: Lockstep, merged: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The merged changes of ``lockstep``, in the dtypes of ``merged``."""
    return {site: lockstep.merged[site].to(change.up.dtype) for site, change in merged.items()}
