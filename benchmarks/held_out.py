"""The held-out error: what a merge gives on rows that it never saw, against each LoRA's own output.

Rows are of prompts made from templates that no merge here uses and of another seed, denoised under
each concept's own LoRA with the guidance that the toybox draws with. The error is squared, of all
rows of a concept over what its LoRA changes there, and the mean over concepts: 0 for the LoRA
itself, 1 for the base. ``guided`` is of the output that sampling uses, with the toybox's guidance;
``prompt`` and ``empty`` are of the two outputs that it is made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from toybox_world import World

from iteris_core import Calibration, Lora
from iteris_core.activations.lockstep import Lockstep
from iteris_core.hosts.rows import TextRows
from iteris_core.lora import SiteChanges
from toybox import TEMPLATES

HELD_OUT = TEMPLATES[5::6]
SEEN = tuple(template for template in TEMPLATES if template not in HELD_OUT)
"""What merges are made from where their held-out error is measured."""

_SEED = 1000
_SAMPLES, _TIMESTEPS = 16, 3
_BATCH = 32


@dataclass(frozen=True)
class Outputs:
    """(rows, …) with the prompt and with the empty one."""

    prompt: Tensor
    empty: Tensor


class HeldOut:
    """The rows of one set of concepts at one size of latents, and what each LoRA gives there."""

    def __init__(
        self,
        world: World,
        numbers: Sequence[int],
        latent_size: int | None,
        templates: Sequence[str] = HELD_OUT,
    ) -> None:
        self.world = world
        self.guidance = float(world.settings["guidance"])
        concepts = world.merged_concepts(numbers)
        self.loras = [concept.lora for concept in concepts if concept.lora is not None]
        sites = set().union(*(lora.sites for lora in self.loras))
        changes = {s: SiteChanges.of([lora.sites.get(s) for lora in self.loras]) for s in sites}
        calibration = Calibration(
            samples=_SAMPLES,
            timesteps=_TIMESTEPS,
            guidance=self.guidance,
            empty_share=0.0,
            contexts=0.0,
            latent_size=latent_size,
            templates=templates,
            seed=_SEED,
        )
        generator = torch.Generator().manual_seed(_SEED)
        with torch.no_grad(), Lockstep(world.host.sites(), changes) as lockstep:
            self.samples: Any = world.host.samples(
                concepts, sites, calibration, lockstep, generator, lambda *_: None
            )
        owners = torch.tensor(self.samples.text.owners)
        self.rows = [(owners == c).nonzero().flatten().tolist() for c in range(len(concepts))]
        self.base = [self.outputs(None, rows) for rows in self.rows]
        self.own = [
            self.outputs(lora, rows) for lora, rows in zip(self.loras, self.rows, strict=True)
        ]

    def errors(self, merged: Lora) -> dict[str, float]:
        found: dict[str, list[float]] = {"guided": [], "prompt": [], "empty": []}
        for rows, own, base in zip(self.rows, self.own, self.base, strict=True):
            ours = self.outputs(merged, rows)
            for name, errors in found.items():
                target, start, got = (self._read(some, name) for some in (own, base, ours))
                error = (got - target).square().sum() / (start - target).square().sum()
                errors.append(float(error))
        return {name: fmean(errors) for name, errors in found.items()}

    def _read(self, outputs: Outputs, name: str) -> Tensor:
        if name == "guided":
            return outputs.empty + self.guidance * (outputs.prompt - outputs.empty)
        return outputs.prompt if name == "prompt" else outputs.empty

    def outputs(self, lora: Lora | None, rows: Sequence[int]) -> Outputs:
        """With the changes on the weights, which are put back bit for bit."""
        text = self.samples.text
        nothing = TextRows.of(text.owners, [""] * len(text.owners))
        with self.world.changed(lora), torch.no_grad():
            return Outputs(
                self._forward(self.samples, rows),
                self._forward(replace(self.samples, text=nothing), rows),
            )

    def _forward(self, samples: Any, rows: Sequence[int]) -> Tensor:
        parts = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        return torch.cat([self.world.host.forward(samples, part) for part in parts]).double()
