"""The regression at one site, and the common part of all ways to solve it.

With rows as tokens, a site's change solves (paper, eqs. 5 to 8)

    M = Σ λ_i (X̃_iᵀX̃_i + ρ_i I),   K = Σ λ_i (T_iᵀX̃_i + ρ_i τ ΔW_i),   ΔW = K M⁻¹,

where ρ_i = α ‖X̃_iᵀX̃_i‖_F, X̃_i are the merged model's inputs on concept i's samples, and T_i are
the target outputs there. In directions without input, ΔW is τ times the mean of the ΔW_i weighted
by λ_i ρ_i; the paper's τ is 1. A :class:`Reduction` defines what the tokens are reduced to and how
that is solved; a :class:`Weigher` finds λ_i.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..activations.tokens import Observation
from ..errors import SolveError
from ..linalg import energy, energy_dtype, solve_device
from ..lora import LowRank, Rank, SiteChanges
from .inputs import InputMoments, output_energy

Objective = Literal["adapter", "output"]
Weighting = Literal["adapter", "tokens", "full", "none"]
Pull = Literal["mean", "size"]
_Moments = TypeVar("_Moments", bound=InputMoments)


@dataclass(frozen=True)
class RegressionSpec:
    """The regression of a site.

    ``weights`` are the concepts' weights, which multiply λ_i. ``weighting`` defines λ_i: ‖ΔW_i‖² /
    ‖X_i ΔW_iᵀ‖² (``adapter``, eq. 8), 1 / tokens, 1 / ‖(W0 + ΔW_i) X_i‖² (``full``), or 1
    (``none``). ``ridge`` is α in eq. 7. ``pull`` defines τ: 1 (``mean``), or the factor that gives
    the mean the changes' size (``size``, see :meth:`pull_of`).

    With ``shrink`` s, the off-diagonal entries of X̃_iᵀX̃_i and X_iᵀX̃_i are multiplied by s, as in
    RegMean, and T_iᵀX̃_i becomes s T_iᵀX̃_i + (1 − s) ΔW_i diag(X̃_iᵀX̃_i), where every concept has
    less than ``shrinks_below`` tokens for each input. ``bound`` is the largest ‖ΔW‖_F allowed: the
    ridge is tripled until the solution keeps it, or reaches 1; then the solution is scaled.

    ``rank`` is the largest rank of the result, or the share of output energy to keep (None: Σ r_i).
    ``dtype`` is the precision of the normal equations if it suffices; otherwise float64.
    ``residuals``: report the solution's distance from the targets.
    """

    weights: Sequence[float]
    ridge: float
    weighting: Weighting = "tokens"
    shrink: float = 1.0
    shrinks_below: float = math.inf
    bound: float = math.inf
    rank: Rank | None = None
    dtype: torch.dtype = torch.float64
    residuals: bool = True
    pull: Pull = "mean"

    def pull_of(self, changes: SiteChanges) -> float:
        """τ for a site: with ``size``, (Σ w_i ‖ΔW_i‖² / Σ w_i)^½ / ‖mean of ΔW_i‖, all Frobenius; 1
        if the mean is zero. It is √N for unrelated changes, and 1 for equal ones."""
        if self.pull == "mean":
            return 1.0
        mean = changes.mean(self.weights, torch.float64).squared_norm()
        if mean <= 0:
            return 1.0
        count = len(changes.by_concept)
        own = sum(self.weights[i] * change.squared_norm() for i, change in changes.own.items())
        own /= sum(self.weights[:count])
        return math.sqrt(min(own / mean, count))

    def lambdas(self, values: Sequence[float]) -> list[float]:
        """λ_i times the concepts' weights, scaled so that the largest is 1, because the ridge is
        relative; just the weights if all are 0."""
        weighted = [value * weight for value, weight in zip(values, self.weights, strict=True)]
        largest = max(weighted)
        if largest <= 0:
            return [float(weight) for weight in self.weights]
        return [value / largest for value in weighted]


@dataclass(frozen=True)
class Solution:
    """A site's change and its quality. Per concept: ``weighting`` is λ_i times the concept's
    weight, scaled to sum to 1; ``errors`` are ‖T_i − X̃_i ΔWᵀ‖_F / ‖T_i‖_F with the mean of the
    changes and with the solution, (2, concepts), on the site's device (None: not requested).
    ``truncated`` is the share of output energy lost in the cut to the rank."""

    change: LowRank
    weighting: tuple[float, ...] = ()
    errors: Tensor | None = None
    truncated: float = 0.0


@dataclass(frozen=True)
class SiteContext:
    """The context of a site when its reduction begins: ``changes`` are the LoRAs', restricted to
    the inputs that count; moments have the ``dtype``. Sites with one ``key`` (None: of its own)
    receive the same tensor, and have their moments in ``shared``. ``sample(n)`` returns about n of
    all targets T by concept, (tokens, out); None if tokens are streamed and unknown until the end.
    """

    changes: SiteChanges
    device: torch.device
    dtype: torch.dtype
    shared: dict[Any, InputMoments] = field(default_factory=dict[Any, InputMoments])
    key: Any = None
    sample: Callable[[int], list[Tensor]] | None = None

    def share(self, kind: type[_Moments]) -> tuple[_Moments, bool]:
        """The site's input moments, and whether they are new, so that it is to add to them."""
        moments = self.shared.get(self.key)
        if isinstance(moments, kind):
            return moments, False
        moments = kind(len(self.changes), self.changes.shape[1], self.dtype, self.device)
        if self.key is not None:
            self.shared[self.key] = moments
        return moments, True


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a reduction keeps until solved (``kept``), that solving needs in addition, and
    that remain of both (``left``) until the next site: moments and factors that may be shared.
    Sites that receive the same tensor hold the ``shared`` part of ``kept`` only once."""

    kept: int
    solve: int
    left: int = 0
    shared: int = 0


class Reduction(ABC):
    """A reduction of the tokens of one site, and its solution."""

    def __init__(self, changes: SiteChanges) -> None:
        self.changes = changes

    @abstractmethod
    def add(self, tokens: Observation) -> None:
        """Add tokens of one concept's rows, in any number of pieces."""

    @abstractmethod
    def solve(self, fit: RegressionSpec) -> Solution:
        """The site's change. Raises :class:`SolveError` if a number is not finite."""


def finite_as(change: LowRank, like: LowRank) -> LowRank:
    """``change`` in the dtype and on the device of ``like``; raises if it is not finite."""
    change = change.to(like.up.dtype, like.up.device)
    if not (bool(torch.isfinite(change.up).all()) and bool(torch.isfinite(change.down).all())):
        raise SolveError("the solution is not finite; raise `ridge`.")
    return change


@dataclass(frozen=True)
class StageSolver:
    """The part of a method that works at a stage's sites: ``begin`` makes a site's reduction, with
    moments in ``dtype``; ``solve`` turns it into a change; ``bytes(site, sweep)`` is their memory.
    ``acting`` are the sites whose own changes show where in an image a LoRA acts. ``inputs`` lists,
    for some sites, which of their inputs count."""

    begin: Callable[[SiteContext], Reduction]
    solve: Callable[[str, Reduction], Solution]
    bytes: Callable[[str, bool], MemoryEstimate]
    dtype: torch.dtype = torch.float32
    acting: Set[str] = frozenset()
    inputs: Mapping[str, Tensor] | None = None


class Weigher:
    """Sums for λ by the ``weightings`` that may be wanted, see :class:`RegressionSpec`: the
    energies of whole ``outputs`` for ``full``; (X downᵀ)ᵀ(X downᵀ), (r_i, r_i), for ``adapter``."""

    def __init__(self, weightings: set[Weighting], context: SiteContext) -> None:
        changes, device = context.changes, context.device
        self.outputs = torch.zeros(len(changes), dtype=energy_dtype(device), device=device)
        self._changes, self.weightings = changes, weightings
        self._grams = {
            i: torch.zeros(change.rank, change.rank, dtype=context.dtype, device=device)
            for i, change in changes.present.items()
            if "adapter" in weightings
        }

    def add(self, tokens: Observation) -> None:
        """Add the tokens of one concept's rows."""
        if "full" in self.weightings:
            self.outputs[tokens.concept] += energy(tokens.output)
        if tokens.concept in self._grams:
            reference, down = tokens.reference, self._changes.present[tokens.concept].down
            hidden = reference @ down.to(reference).mT
            self._grams[tokens.concept].addmm_(hidden.mT, hidden)

    def energy(self, concept: int) -> Tensor:
        """‖X_i ΔW_iᵀ‖²_F, a scalar; 0 if the LoRA does not change the site."""
        change = self._changes[concept]
        if change is None:
            return torch.zeros((), dtype=torch.float64)
        up = change.to(torch.float64, solve_device(self.outputs.device)).up
        return (self._grams[concept].to(up) * (up.mT @ up)).sum()

    def values(self, weighting: Weighting, inputs: InputMoments) -> list[float]:
        """λ_i without the concepts' weights. If a LoRA does not change the site, eq. 8 is 0/0, and
        λ_i is the gain of the other LoRAs' changes on that concept's inputs."""

        def inverse(norm: float, energy_of_outputs: float) -> float:
            return norm / energy_of_outputs if energy_of_outputs > 0 and norm > 0 else 1.0

        if weighting == "tokens":
            return [1.0 / max(count, 1.0) for count in inputs.tokens.tolist()]
        if weighting == "full":
            return [inverse(1.0, value) for value in self.outputs.tolist()]
        if weighting == "none":
            return [1.0] * len(self._changes)
        values: list[float] = []
        for concept, (change, own) in enumerate(zip(self._changes, inputs.own, strict=True)):
            if change is not None:
                values.append(inverse(change.squared_norm(), float(self.energy(concept))))
                continue
            others = self._changes.own.values()
            norm = sum(other.squared_norm() for other in others)
            values.append(inverse(norm, float(sum(output_energy(other, own) for other in others))))
        return values
