"""What reaches the sites of a pair's denoiser: under each LoRA, in a merge, and after it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from held_out import SEEN
from torch import Tensor, nn
from toybox_world import World

from iteris_core import Calibration, Lora, merge_loras
from iteris_core.activations.lockstep import Lockstep
from iteris_core.lora import SiteChanges
from iteris_core.solve.choose import Policy

FEW = Calibration(samples=12, timesteps=2, templates=SEEN)
AT_ONCE = 1024
"""More rows than there are: one forward, whose rows have a known order."""

Inputs = Mapping[str, Tensor]


class Pair:
    """The rows of one pair, the same as a merge of it makes, and what reaches the LoRAs' sites of
    the denoiser; the text encoder's, which runs a row for each prompt, count in chains only."""

    def __init__(self, world: World, numbers: Sequence[int]) -> None:
        self.world = world
        self.concepts = world.merged_concepts(numbers, None, 0.0)
        self.loras = [concept.lora for concept in self.concepts if concept.lora is not None]
        names = sorted(set().union(*(lora.sites for lora in self.loras)))
        self.all_sites = {name: world.host.sites()[name] for name in names}
        self.sites = {
            name: site for name, site in self.all_sites.items() if name.startswith("unet")
        }
        changes = {s: SiteChanges.of([lora.sites.get(s) for lora in self.loras]) for s in names}
        generator = torch.Generator().manual_seed(FEW.seed)
        with torch.no_grad(), Lockstep(world.host.sites(), changes) as lockstep:
            self.samples: Any = world.host.samples(
                self.concepts, set(names), FEW, lockstep, generator, lambda *_: None
            )
        owners = torch.tensor(self.samples.text.owners)
        self.rows = [(owners == c).nonzero().flatten().tolist() for c in range(len(self.loras))]

    def forward(self, rows: Sequence[int]) -> None:
        with torch.no_grad():
            self.world.host.forward(self.samples, rows)

    def inputs(self, lora: Lora) -> Inputs:
        """Of all rows, with ``lora`` on the weights."""
        rows = [row for some in self.rows for row in some]
        with self.world.changed(lora), _kept(self.sites) as kept:
            self.forward(rows)
        return kept

    def own_inputs(self) -> list[Inputs]:
        """Of each concept's rows, with its own LoRA on the weights."""
        found: list[Inputs] = []
        for lora, rows in zip(self.loras, self.rows, strict=True):
            with self.world.changed(lora), _kept(self.sites) as kept:
                self.forward(rows)
            found.append(kept)
        return found

    def merged(self, method: str, settings: Mapping[str, Any]) -> tuple[Lora, Inputs]:
        """The merge, and what its last solve took for the merged model's inputs: the second half of
        a forward of reference and merged rows; the reference rows' own where there was none."""
        with _kept(self.sites) as kept:
            merged = merge_loras(
                self.world.host,
                self.concepts,
                method,
                settings={**settings, "micro_batch": AT_ONCE},
                calibration=FEW,
                policy=Policy(sample_rows=AT_ONCE),  # else the sampled rows run first
            ).lora
        rows = sum(map(len, self.rows))
        return merged, {
            site: seen[rows:] if len(seen) > rows else seen for site, seen in kept.items()
        }


@contextmanager
def _kept(sites: Mapping[str, nn.Module]) -> Generator[dict[str, Tensor]]:
    """What reached each site in the last of the calls with the most rows."""
    kept: dict[str, Tensor] = {}

    def hook(site: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if site not in kept or len(args[0]) >= len(kept[site]):
                kept[site] = args[0].clone()

        return keep

    handles = [module.register_forward_pre_hook(hook(site)) for site, module in sites.items()]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
