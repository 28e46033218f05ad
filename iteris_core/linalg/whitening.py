"""The square root of a layer's input moments and its inverse, without an (in, in) matrix.

A gradient step on a change D, (rank, in), moves most where inputs are large and hardly where they
are small, however much the outputs depend on it. For P = D M^½, with M the inputs' moments, every
direction counts by its effect on the outputs: a natural gradient with respect to inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import full_precision


@dataclass(frozen=True)
class Whitening:
    """M = XᵀX / tr(XᵀX) · in + floor I for tokens X, (tokens, in); M's eigenvalues have mean 1 +
    ``floor``.

    ``directions`` are the eigenvectors of XᵀX with nonzero eigenvalues, (k, in), and ``roots`` the
    square roots of M's eigenvalues there, (k,); elsewhere the root is √floor. float32.
    """

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
