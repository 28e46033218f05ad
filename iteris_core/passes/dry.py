"""One short pass before a merge: which sites no forward reaches, and which mix rows.

Every stage runs a row or two of pure noise, with no LoRA in force. What is found there would
otherwise be found at the end, after minutes or hours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..activations.lockstep import Lockstep
from ..concepts import Calibration, Concept
from ..hosts.protocol import Host, Stage, Tick

UNREACHED = "is reached by no forward"
MIXED = "gets the rows of a batch mixed or split"
REPEATED = 'is called more than once in a forward, which only schedule="jacobi" takes'


def unmergeable(
    host: Host,
    concepts: Sequence[Concept],
    sites: Set[str],
    calibration: Calibration,
    tick: Tick,
    *,
    sweep: bool,
) -> dict[str, str]:
    """Site of ``sites`` → why its features cannot be collected, by a ``sweep`` or otherwise; empty
    where all can be.

    The generator is one of its own, so that the merge draws what it would draw without this pass.
    """
    short = replace(calibration, samples=1, timesteps=calibration.denoising_steps, latents="noise")
    generator = torch.Generator().manual_seed(calibration.seed)
    modules = {site: host.sites()[site] for site in sites}
    seen: dict[str, list[bool]] = {}
    with Lockstep({}, {}) as lockstep, torch.no_grad():
        samples = host.samples(concepts, sites, short, lockstep, generator, tick)
        for stage in host.stages(samples, sites):
            seen |= _seen(stage, modules)
    repeated = {site: REPEATED for site, calls in seen.items() if sweep and len(calls) > 1}
    mixed = {site: MIXED for site, calls in seen.items() if not all(calls)}
    return repeated | mixed | {site: UNREACHED for site in sites if site not in seen}


def _seen(stage: Stage, modules: Mapping[str, nn.Module]) -> dict[str, list[bool]]:
    """The sites that ``stage`` reaches, and for every call of each whether it gets one row for each
    of the batch."""
    first, *others = range(len(stage.owners))
    rows = [first, first]
    seen: dict[str, list[bool]] = {}
    handles = [
        modules[site].register_forward_pre_hook(_note(site, len(rows), seen))
        for site in stage.sites
    ]
    try:
        stage.run(rows, 1)
    finally:
        for handle in handles:
            handle.remove()
    for row in others if stage.feeds else ():
        stage.run([row], 1)
    return seen


def _note(site: str, rows: int, seen: dict[str, list[bool]]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(site, []).append(args[0].shape[0] == rows)

    return hook


def complaint(
    found: Mapping[str, str], concepts: Sequence[Concept], *, refused: bool = True
) -> str:
    """What to say of sites that cannot be merged: where, by which file, and what to do."""
    parts: list[str] = []
    for why, count in Counter(found.values()).items():
        site = min(name for name, reason in found.items() if reason == why)
        files = [
            concept.lora.source or concept.lora.name
            for concept in concepts
            if concept.lora is not None and site in concept.lora.sites
        ]
        parts.append(f"{count} sites, such as {site} (in {', '.join(files)}): it {why}")
    text = "; ".join(parts)
    if not refused:
        return text
    return (
        f"Of the LoRAs' sites {len(found)} cannot be merged by their features: {text}. Give the "
        "model what those layers wait for (a picture, a first frame, a control), leave them out, "
        "or give them the mean of the LoRAs' changes (unmergeable: skip or mean)."
    )
