"""Adam steps on merged changes: the trained factors, and the training loop.

A gradient step on a change D, (rank, in), moves most where inputs are large and hardly where they
are small, however much the outputs depend on it. For P = D M^½, with M the inputs' moments, every
direction counts by its effect on the outputs: a natural gradient with respect to inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations.lockstep import Lockstep
from ..activations.memory import is_out_of_memory
from ..errors import IterisError, brief
from ..linalg import full_precision
from ..lora import LowRank

STEP = 3.0
"""The time of a step in forwards: one, plus two for the gradients."""


@dataclass(frozen=True)
class Whitening:
    """M = XᵀX / tr(XᵀX) · in + floor I for tokens X, (tokens, in), without an (in, in) matrix.
    ``directions`` are the eigenvectors of XᵀX with nonzero eigenvalues, (k, in), and ``roots`` the
    square roots of M's eigenvalues there, (k,); elsewhere the root is √floor. float32."""

    directions: Tensor
    roots: Tensor
    floor: float

    @classmethod
    def of(cls, tokens: Tensor, floor: float) -> Whitening:
        """The whitening of (tokens, in), which must be finite. Tokens that are all zero give √floor
        everywhere."""
        tokens = tokens.double()
        count, width = tokens.shape
        with full_precision(tokens.device):
            gram = tokens.mT @ tokens if width <= count else tokens @ tokens.mT
            values, vectors = torch.linalg.eigh(gram)
            kept = values > 1e-10 * values[-1]
            values, vectors = values[kept], vectors[:, kept]
            if width > count:
                vectors = tokens.mT @ vectors / values.sqrt()
        values = values * (width / float(values.sum())) if len(values) else values
        return cls(vectors.mT.float(), (values + floor).sqrt().float(), floor)

    def root(self, rows: Tensor) -> Tensor:
        """``rows`` (…, in) times M^½."""
        return self._times(rows, self.roots, self.floor**0.5)

    def inverse_root(self, rows: Tensor) -> Tensor:
        """``rows`` (…, in) times M^-½."""
        return self._times(rows, 1 / self.roots, self.floor**-0.5)

    def _times(self, rows: Tensor, values: Tensor, elsewhere: float) -> Tensor:
        within = rows @ self.directions.mT
        return rows * elsewhere + (within * (values - elsewhere)) @ self.directions


class NoGradients(IterisError):
    """The factors do not reach the loss, or reach it through operations without gradients."""


@dataclass(frozen=True)
class Factors:
    """Up and down factors by site, as float32 leaves. Down factors are those for whitened inputs,
    so a step of a given size moves a site's output about equally in every direction."""

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
            whole = across @ whitening.root(change.down)
            left, values, right = torch.linalg.svd(whole, full_matrices=False)
            root = values.sqrt()
            ups[site] = (up @ left * root).detach().requires_grad_()
            downs[site] = (root[:, None] * right).detach().requires_grad_()
        return cls(ups, downs, {site: merged[site].kernel for site in tokens}, whitenings)

    def put(self, lockstep: Lockstep) -> None:
        """Install the factors as merged changes, with gradients if enabled."""
        for site, whitening in self.whitenings.items():
            up, down = self.ups[site], whitening.inverse_root(self.downs[site])
            if not torch.is_grad_enabled():
                up, down = up.detach(), down.detach()
            lockstep.merged[site] = LowRank(up, down, self.kernels[site])

    def train(
        self, rate: float, steps: int, loss: Callable[[], Tensor], tick: Callable[[int], None]
    ) -> None:
        """Take that many steps of Adam. A factor's learning rate is ``rate`` times the root mean
        square of its entries; it rises over ten steps and falls to zero.

        ``loss()`` draws a random batch; ``tick`` gets the number of steps done. Raises
        :class:`NoGradients` if a step is impossible.
        """
        factors = [*self.ups.values(), *self.downs.values()]
        groups: list[dict[str, Any]] = [
            {"params": [factor], "lr": rate * float(factor.detach().square().mean().sqrt())}
            for factor in factors
        ]
        adam = torch.optim.Adam(groups, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1.0, (step + 1) / 10) * (1 - step / steps)
        )
        for step in range(1, steps + 1):
            with torch.enable_grad():
                error, gradients = loss(), list[Tensor | None]()
            try:
                if error.requires_grad:
                    gradients += torch.autograd.grad(error, factors, allow_unused=True)
            except RuntimeError as failed:
                if is_out_of_memory(failed):
                    raise
                raise NoGradients(brief(failed)) from failed
            # A site that does not reach the loss has none, such as a text encoder's last layers.
            if all(gradient is None for gradient in gradients):
                raise NoGradients("no change reaches the compared output")
            for factor, gradient in zip(factors, gradients, strict=True):
                factor.grad = gradient
            adam.step()
            schedule.step()
            tick(step)
