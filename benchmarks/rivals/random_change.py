"""A control in a merge's place: random changes.

up′, down′ ~ N(0, 1) of the shapes that the sum Σ_i w_i up_i down_i has, scaled to its Frobenius
norm, at each site.
"""

from __future__ import annotations

import torch

from iteris_core.lora import LowRank, concatenate
from iteris_core.methods.registry import AtSite, on_weights
from iteris_core.settings import Settings


@on_weights("random", Settings)
def random_change(at: AtSite, settings: Settings) -> tuple[LowRank, float]:
    """Random directions, with the norm and the rank of the sum."""
    whole = concatenate(at.weighted())
    up, down = (torch.randn(f.shape, generator=at.generator).to(f) for f in (whole.up, whole.down))
    found = LowRank(up, down, whole.kernel)
    size = (whole.squared_norm() / found.squared_norm()) ** 0.5
    return LowRank(up * size, down, whole.kernel), 0.0
