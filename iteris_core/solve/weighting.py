"""λ_i, which balances a site's concepts, from sums over their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..linalg.precision import energy, energy_dtype
from ..lora import LowRank, SiteChanges
from .inputs import InputMoments, output_energy
from .problem import SiteContext, Tokens, Weighting


class Weigher:
    """Sums for λ; λ_i is then ``values`` times the concepts' weights. By itself ``none``: 1."""

    def add(self, tokens: Tokens) -> None:
        """Add the tokens of one concept's rows."""

    def values(self, changes: SiteChanges, inputs: InputMoments) -> list[float]:
        return [1.0] * len(changes)


class ByTokens(Weigher):
    """``tokens``: λ_i = 1 / number of concept i's tokens."""

    def values(self, changes: SiteChanges, inputs: InputMoments) -> list[float]:
        return token_values(inputs.tokens.tolist())


class ByAdapter(Weigher):
    """``adapter``: λ_i = ‖ΔW_i‖²_F / ‖X_i ΔW_iᵀ‖²_F (eq. 8), from (X downᵀ)ᵀ(X downᵀ), (r_i, r_i).

    If a LoRA does not change the site (eq. 8 is 0/0), it is the gain of the other LoRAs' changes on
    that concept's inputs.
    """

    def __init__(self, changes: SiteChanges, dtype: torch.dtype, device: torch.device) -> None:
        self._changes = changes
        self._grams = {
            i: torch.zeros(change.rank, change.rank, dtype=dtype, device=device)
            for i, change in changes.present.items()
        }

    def add(self, tokens: Tokens) -> None:
        change = self._changes[tokens.concept]
        if change is not None:
            reference = tokens.reference
            hidden = reference @ change.down.to(reference).mT
            self._grams[tokens.concept].addmm_(hidden.mT, hidden)

    def energy(self, concept: int) -> float:
        """‖X_i ΔW_iᵀ‖²_F; 0 if the LoRA does not change the site."""
        change = self._changes[concept]
        if change is None:
            return 0.0
        up = change.up.double()
        return float((self._grams[concept].to(up) * (up.mT @ up)).sum())

    def values(self, changes: SiteChanges, inputs: InputMoments) -> list[float]:
        return [
            _inverse(change.squared_norm(), self.energy(concept))
            if change is not None
            else _gain_of_others(concept, changes.own, inputs.own[concept])
            for concept, change in enumerate(changes)
        ]


class ByOutput(Weigher):
    """``full``: λ_i = 1 / ‖(W0 + ΔW_i) X_i‖²_F, the layer's bias included."""

    def __init__(self, concepts: int, device: torch.device) -> None:
        self.energies = torch.zeros(concepts, dtype=energy_dtype(device), device=device)

    def add(self, tokens: Tokens) -> None:
        self.energies[tokens.concept] += energy(tokens.output)

    def values(self, changes: SiteChanges, inputs: InputMoments) -> list[float]:
        return [_inverse(1.0, value) for value in self.energies.tolist()]


def weigher(weighting: Weighting, context: SiteContext, dtype: torch.dtype) -> Weigher:
    """The weigher of that name, for a site."""
    if weighting == "adapter":
        return ByAdapter(context.changes, dtype, context.device)
    if weighting == "full":
        return ByOutput(len(context.changes), context.device)
    return ByTokens() if weighting == "tokens" else Weigher()


def token_values(counts: Sequence[float]) -> list[float]:
    """1 / tokens for every concept."""
    return [1.0 / max(count, 1.0) for count in counts]


def _gain_of_others(concept: int, present: dict[int, LowRank], own: Tensor) -> float:
    others = [change for i, change in present.items() if i != concept]
    norm = sum(change.squared_norm() for change in others)
    return _inverse(norm, sum(output_energy(change, own) for change in others))


def _inverse(norm: float, energy_of_outputs: float) -> float:
    return norm / energy_of_outputs if energy_of_outputs > 0 and norm > 0 else 1.0
