"""The denoiser's output on rows that no fit saw, with and without a LoRA.

Rows use prompts from templates to which nothing was fitted, and another seed, denoised under each
concept's own LoRA. Outputs are those that sampling uses, with the toybox's guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from protocol.drawing import changed
from protocol.toybox import ToyboxWorld
from torch import Tensor

from iteris_core import Calibration, Lora
from iteris_core.activations.lockstep import Lockstep
from iteris_core.hosts.rows import TextRows
from iteris_core.lora import SiteChanges
from toybox import TEMPLATES

HELD_OUT = TEMPLATES[5::6]
_SEED, _BATCH = 1000, 32


class HeldOut:
    """The rows of one set of concepts, and the base's output there, by concept."""

    def __init__(
        self,
        world: ToyboxWorld,
        names: Sequence[str],
        latent_size: int,
        templates: Sequence[str] = HELD_OUT,
    ) -> None:
        self._host = world.host
        self._guidance = world.sampling["guidance_scale"]
        concepts = world.concepts(names)
        loras = [concept.lora for concept in concepts]
        sites = set().union(*(lora.sites for lora in loras))
        changes = {s: SiteChanges.of([lora.sites.get(s) for lora in loras]) for s in sites}
        calibration = Calibration(
            samples=16,
            timesteps=3,
            guidance=self._guidance,
            empty_share=0.0,
            contexts=0.0,
            latent_size=latent_size,
            templates=templates,
            seed=_SEED,
        )
        generator = torch.Generator().manual_seed(_SEED)
        with torch.no_grad(), Lockstep(self._host.sites(), changes) as lockstep:
            self._samples: Any = self._host.samples(
                concepts, sites, calibration, lockstep, generator, lambda *_: None
            )
        owners = torch.tensor(self._samples.text.owners)
        self.rows = [(owners == c).nonzero().flatten().tolist() for c in range(len(concepts))]
        self.base = [self.guided(None, rows) for rows in self.rows]

    def guided(self, lora: Lora | None, rows: Sequence[int]) -> Tensor:
        """The output with the changes added to the weights, which are restored bit for bit."""
        text = self._samples.text
        nothing = replace(self._samples, text=TextRows.of(text.owners, [""] * len(text.owners)))
        with changed(self._host, lora), torch.no_grad():
            named, plain = (self._forward(some, rows) for some in (self._samples, nothing))
        return plain + self._guidance * (named - plain)

    def _forward(self, samples: Any, rows: Sequence[int]) -> Tensor:
        parts = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        return torch.cat([self._host.forward(samples, part) for part in parts]).double()


def relative(found: Tensor, wanted: Tensor, base: Tensor) -> float:
    """‖found − wanted‖ / ‖base − wanted‖: 0 for the target, 1 for the base."""
    return float((found - wanted).norm() / (base - wanted).norm())
