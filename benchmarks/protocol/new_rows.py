"""The denoiser's outputs on rows of new prompts and another seed, with and without changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from iteris_core import Calibration, Concept, LowRank
from iteris_core.activations.lockstep import Lockstep
from iteris_core.activations.rows import Row
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.protocol import SampleRequest
from iteris_core.passes.changes import changes_of
from iteris_core.passes.held_out import FinalOutputs

_BATCH = 16


class NewRows:
    """Rows of ``concepts``, each denoised under its own LoRA; :attr:`of` has their numbers by
    concept."""

    def __init__(
        self, host: DiffusersHost, concepts: Sequence[Concept], seed: int, **calibration: Any
    ) -> None:
        plain = dict.fromkeys(("contexts", "conditions", "empty_share"), 0.0)
        fields = Calibration(seed=seed, timesteps=3, **plain, **calibration)
        changes, generator = changes_of(concepts), torch.Generator().manual_seed(seed)
        self._host = host
        with torch.no_grad(), Lockstep(host.sites(), changes) as lockstep:
            request = SampleRequest(concepts, fields, lockstep, generator, lambda *_: None)
            self._samples: Any = host.samples(request)
        rows: Sequence[Row] = self._samples.rows
        self.of = [
            [row.number for row in rows if row.concept == concept]
            for concept in range(len(concepts))
        ]

    def outputs(
        self, changes: Mapping[str, LowRank], rows: Sequence[int], guidance: float | None = None
    ) -> Tensor:
        """float64; with ``guidance`` away from the empty prompt."""
        named = self._outputs(self._samples, changes, rows)
        if guidance is None:
            return named
        empty = [replace(row, prompt="") for row in self._samples.rows]
        plain = self._outputs(replace(self._samples, rows=empty), changes, rows)
        return plain + guidance * (named - plain)

    def _outputs(self, samples: Any, changes: Mapping[str, LowRank], rows: Sequence[int]) -> Tensor:
        concepts = [concept for concept, of in enumerate(self.of) if not set(of).isdisjoint(rows)]
        found = FinalOutputs(self._host, samples, _BATCH).under(changes, concepts)
        return torch.stack([found[row] for row in rows])


def relative(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """‖found − wanted‖ / ‖base − wanted‖: 0 for the target, 1 for the base."""
    return float((found - wanted).norm() / (base - wanted).norm())
