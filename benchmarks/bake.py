"""A LoRA baked in fp8, compared with plain rounding: ``python benchmarks/bake.py`` on the toybox.

Writes ``benchmarks/results/bake.json``: for each way of rounding the UNet's linear layers, with the
LoRA added, the error of the guided output on held-out rows, as a share of the LoRA's effect in full
precision. ``plain`` is torch's cast to float8; ``scaled`` is ``iteris bake --dtype fp8``. Means
over the toybox's first three LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

from held_out import HeldOut, relative
from outputs import result_file, write
from protocol.toybox import ToyboxWorld
from torch import Tensor

from iteris_core import Lora
from iteris_core.edit.bake import FP8, scaled_fp8

NAMES = ("sks1", "sks2", "sks3")
LATENTS = 8


def scaled(weight: Tensor) -> Tensor:
    stored, scale = scaled_fp8(weight)
    return stored.float() * scale


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda weight: weight.to(FP8).float(),
    "scaled": scaled,
}


def error_of(
    world: ToyboxWorld, held: HeldOut, lora: Lora, way: Callable[[Tensor], Tensor]
) -> float:
    """The error with the LoRA added to the UNet's linear layers, and these rounded."""
    sites = world.host.sites()
    linear = [s for s in sites if s.startswith("unet.") and sites[s].weight.ndim == 2]
    kept = {site: sites[site].weight.data.clone() for site in linear}
    alone = Lora({site: change for site, change in lora.sites.items() if site not in kept})
    (rows,), (base,) = held.rows, held.base
    wanted = held.guided(lora, rows)
    try:
        for site in linear:
            change = lora.sites.get(site)
            whole = kept[site] if change is None else kept[site] + change.dense()
            sites[site].weight.data.copy_(way(whole))
        return relative(held.guided(alone, rows), wanted, base)
    finally:
        for site, weight in kept.items():
            sites[site].weight.data.copy_(weight)


def main() -> None:
    world = ToyboxWorld()
    errors: dict[str, list[float]] = {way: [] for way in WAYS}
    for name in NAMES:
        held = HeldOut(world, [name], LATENTS)
        (concept,) = world.concepts([name])
        for label, way in WAYS.items():
            errors[label].append(error_of(world, held, concept.lora, way))
    found = {name: round(fmean(of), 4) for name, of in errors.items()}
    write(result_file("bake.json"), found)
    print(found)


if __name__ == "__main__":
    main()
