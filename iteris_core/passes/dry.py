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
from ..activations.pace import Pace
from ..activations.site import site_of
from ..concepts import Calibration, Concept
from ..hosts.protocol import Host, Stage, Tick
from .outlook import Outlook

UNREACHED = "is reached by no forward"
PARTLY = 'is reached by some of the prompts only, which schedule="jacobi" of iteris takes'
MIXED = "gets the rows of a batch mixed or split"
REPEATED = 'is called more than once in a forward, which schedule="jacobi" of iteris takes'


def unmergeable(
    host: Host,
    concepts: Sequence[Concept],
    sites: Set[str],
    calibration: Calibration,
    tick: Tick,
    *,
    sweep: bool,
    outlook: Outlook | None = None,
) -> dict[str, str]:
    """Site of ``sites`` → why its features cannot be collected, by a ``sweep`` or otherwise; empty
    where all can be. ``outlook`` is told what was seen.

    The generator is one of its own, so that the merge draws what it would draw without this pass.
    """
    short = replace(calibration, samples=1, timesteps=calibration.denoising_steps, latents="noise")
    generator = torch.Generator().manual_seed(calibration.seed)
    modules = {site: host.sites()[site] for site in sites}
    outlook = outlook or Outlook()

    def quiet(what: str, done: int, total: int) -> None:
        tick("looking at the sites", 0, 0)

    found: dict[str, str | None] = {}
    # Some layers wait for words that one prompt may lack, such as those in quotes.
    every_prompt = replace(short, samples=calibration.samples, timesteps=1)
    with Lockstep({}, {}) as lockstep, torch.no_grad():
        for some in (short, every_prompt):
            samples = host.samples(concepts, sites, some, lockstep, generator, quiet)
            for stage in host.stages(samples, sites):
                every_kind = some is every_prompt
                found |= _look(stage, modules, outlook.pace, every_kind=every_kind, sweep=sweep)
                if not every_kind:
                    outlook.saw(stage, concepts, calibration)
            if sites <= found.keys():
                break
    return {site: why for site in sites if (why := found.get(site, UNREACHED)) is not None}


def _look(
    stage: Stage, modules: Mapping[str, nn.Module], pace: Pace, *, every_kind: bool, sweep: bool
) -> dict[str, str | None]:
    """The sites that ``stage`` reaches with its first row, or with the first row of every kind,
    and what keeps them from being merged."""
    kinds = stage.kinds if stage.kinds and every_kind else [None] * len(stage.owners)
    firsts = {kind: row for row, kind in reversed(list(enumerate(kinds)))}.values()
    calls: dict[str, list[bool]] = {}
    reached: Counter[str] = Counter()
    whole: dict[str, bool] = {}
    repeated: set[str] = set()
    handles = [modules[site].register_forward_pre_hook(_note(site, calls)) for site in stage.sites]
    handles += [
        modules[site].register_forward_hook(pace.hook(site, site_of(site, modules[site])))
        for site in stage.sites
    ]
    try:
        for row in firsts:
            calls.clear()
            pace.begin()
            stage.run([row, row], 1)
            reached.update(calls.keys())
            whole |= {site: whole.get(site, True) and all(some) for site, some in calls.items()}
            repeated |= {site for site, some in calls.items() if len(some) > 1}
    finally:
        for handle in handles:
            handle.remove()
    for row in set(range(len(stage.owners))) - set(firsts) if stage.feeds else ():
        stage.run([row], 1)
    why: dict[str, str | None] = dict.fromkeys(reached)
    if sweep:
        why |= {site: PARTLY for site, count in reached.items() if count < len(firsts)}
        why |= dict.fromkeys(repeated, REPEATED)
    return why | {site: MIXED for site, one in whole.items() if not one}


def _note(site: str, calls: dict[str, list[bool]]) -> Callable[..., None]:
    """For every call of the site whether it gets one row for each of the two of the batch."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls.setdefault(site, []).append(args[0].shape[0] == 2)

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
