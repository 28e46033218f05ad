"""Gradients of steps through a denoiser, held against finite differences of the loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch


def check_gradients(
    monkeypatch: Any, gradients: Any, thresholds: Any, merge: Callable[[Any], Any]
) -> Any:
    """A merge, by ``merge(thresholds)``, in which the loss of every denoiser's first step changes
    by finite differences as its gradients say: along them, and along a direction at random.
    ``gradients`` is the class RowGradients; the blocks' outputs do not count."""
    add, settled = gradients.add, gradients.settled
    batches: list[Sequence[int]] = []
    checked: list[str] = []

    def watched(self: Any, rows: Sequence[int], *, first: bool) -> None:
        if first:  # no trial
            batches.append(rows)
        add(self, rows, first=first)

    def loss(self: Any, direction: Sequence[torch.Tensor], by: float) -> float:
        moved, total = list(zip(self.leaves, direction, strict=True)), 0.0
        with torch.no_grad():
            for leaf, step in moved:
                leaf += by * step
            for rows in batches:
                gap = self._outputs(rows, 1, merged=True) - self._outputs(rows, 0)
                weights = torch.tensor([self._weights[row] for row in rows]).double()
                total += float((weights * gap.double().flatten(1).square().sum(1)).sum())
            for leaf, step in moved:
                leaf -= by * step
        return total

    def check(self: Any) -> bool:
        finite, generator = settled(self), torch.Generator().manual_seed(0)
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self.leaves]
        sizes = [leaf.detach().square().mean().sqrt() for leaf in self.leaves]
        steepest = [grad * size**2 for grad, size in zip(grads, sizes, strict=True)]
        slope = sum(float((a * b).sum()) for a, b in zip(grads, steepest, strict=True))
        at_random = [  # up in every factor
            size * (noise if float((noise * grad).sum()) > 0 else -noise)
            for grad, size in zip(grads, sizes, strict=True)
            for noise in [torch.randn(grad.shape, generator=generator)]
        ]
        by = 0.02 * loss(self, steepest, 0.0) / slope
        # Which step is neither too long nor lost in rounding differs from model to model.
        for direction, steps, near in (
            (steepest, [by], 0.02),
            (at_random, [3e-3, 1e-3, 3e-4, 1e-4], 0.05),
        ):
            told = sum(float((a * b).sum()) for a, b in zip(grads, direction, strict=True))
            gaps = [(loss(self, direction, by) - loss(self, direction, -by)) / by for by in steps]
            right = any(gap / 2 == pytest.approx(told, rel=near) for gap in gaps)
            checked.append("" if right else f"{gaps} for twice {told}")
        batches.clear()
        return finite

    with monkeypatch.context() as patched:
        patched.setattr(gradients, "add", watched)
        patched.setattr(gradients, "settled", check)
        result = merge(replace(thresholds, hints=0.0))
    assert not any(checked), checked
    assert "ended" not in str(result.report.notes["steps"])
    return result
