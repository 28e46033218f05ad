"""Reductions of given tokens, without a model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from iteris_core.lora import SiteChanges
from iteris_core.solve.inputs import CrossMoments, InputMoments
from iteris_core.solve.moments import AdapterMoments, OutputMoments
from iteris_core.solve.problem import (
    MemoryEstimate,
    RegressionSpec,
    SiteContext,
    Solution,
    StageSolver,
)

CPU = torch.device("cpu")


@dataclass
class Rows:
    """One concept's tokens; what a reduction does not ask for may be left out."""

    concept: int
    merged: Tensor
    reference: Tensor | None = None
    target: Tensor | None = None
    output: Tensor | None = None


def context(changes, dtype=torch.float64, **known) -> SiteContext:
    """Of a site that shares its inputs with none."""
    return SiteContext(SiteChanges.of(changes), CPU, dtype, **known)


def solver_of(begin, **more) -> StageSolver:
    """One that begins reductions, which are solved elsewhere."""
    return StageSolver(begin, lambda *_: Solution(None), lambda *_: MemoryEstimate(0, 0), **more)


def by_moments(changes, inputs, targets, weighting="tokens", directions=None) -> OutputMoments:
    dtype = inputs[0].dtype
    reduction = OutputMoments(context(changes, dtype), weighting, directions)
    return filled(reduction, inputs, targets)


def by_adapter(changes, inputs, references, weighting="tokens") -> AdapterMoments:
    dtype = inputs[0].dtype
    reduction = AdapterMoments(context(changes, dtype), weighting)
    for concept, (merged, reference) in enumerate(zip(inputs, references, strict=True)):
        reduction.add(Rows(concept, merged, reference))
    return reduction


def filled(reduction, inputs, targets):
    for concept, (merged, target) in enumerate(zip(inputs, targets, strict=True)):
        reduction.add(Rows(concept, merged, target=target))
    return reduction


def solved(reduction, weights, **settings) -> Solution:
    return reduction.solve(RegressionSpec(weights, **settings))


def moments_of(inputs, kind=InputMoments) -> InputMoments | CrossMoments:
    """X̃ᵀX̃ of every concept's X̃, (tokens, in)."""
    moments = kind(len(inputs), inputs[0].shape[1], inputs[0].dtype, CPU)
    for concept, merged in enumerate(inputs):
        moments.add(concept, merged)
    return moments
