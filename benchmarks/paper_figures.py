"""The paper's own figures and its appendix A.3, on the toybox.

``python benchmarks/paper_figures.py [discrepancy|samples|terms|bound|embedding …]`` writes
``benchmarks/results/paper_figures.json`` as the figures come.

- ``discrepancy`` (figure 3a): how far the inputs that a method's last solve took for the merged
  model's are from those that the merged model sees, ‖X̃ − X̃_true‖ / ‖X̃_true‖ of all rows, by the
  length of the longest chain of sites up to a site.
- ``samples`` (figure 3b): the held-out error by the number of prompts, see :mod:`held_out`.
- ``terms`` (figure 3c): the share of the larger of the objective's terms, λ_i ‖X_i ΔW_iᵀ‖², with
  and without the paper's λ, and the same of the whole weights W_0 + ΔW_i.
- ``bound`` (appendix A.3): how many iterations are enough, and by how much the site that moves most
  still moves in each.
- ``embedding``: textual inversion as a baseline. The two concepts of pivotal tuning drawn with
  their embedding alone, with embedding and LoRA, and with neither.

Sets are pairs that the quality suite does not report: 3, 5 and, for ``terms``, 8, 9 as well.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

from held_out import SEEN, HeldOut
from iteration_bound import depths, iterations_bound
from outputs import read, result_file, write
from pair_inputs import FEW, Pair
from PIL import Image
from toybox_world import SEEDS, Picture, World

import toybox
from iteris_core import Calibration, merge_loras
from iteris_core.activations.site import site_of

FILE = result_file("paper_figures.json")
PAIR = (3, 5)
PAIRS = PAIR, (8, 9)
PAPER: dict[str, Any] = {
    "objective": "adapter",
    "weighting": "adapter",
    "ridge": 1e-4,
    "saliency": 0.0,
    "repair": False,
}
"""The paper's objective; its Algorithm 1 with ``schedule="jacobi"``."""

ITERATIONS = (1, 2, 5, 10)
COUNTS = (6, 12, 25, 50)


def discrepancy(world: World) -> dict[str, Any]:
    """method → depth → mean over sites."""
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "RegMean": ("regmean", {"shrink": 1.0}),
        **{
            f"Algorithm 1, {count} {'solve' if count == 1 else 'solves'}": (
                "iteris", {**PAPER, "schedule": "jacobi", "iterations": count},
            )
            for count in ITERATIONS
        },
        "one sweep": ("iteris", {**PAPER, "schedule": "sweep"}),
    }  # fmt: skip
    pair = Pair(world, PAIR)
    chains = depths(pair.all_sites, lambda: pair.forward([0]))
    found: dict[str, dict[str, float]] = {}
    for name, (method, settings) in methods.items():
        merged, taken = pair.merged(method, settings)
        true = pair.inputs(merged)
        by_depth: dict[int, list[float]] = {}
        for site in pair.sites:
            apart = (taken[site] - true[site]).double().norm() / true[site].double().norm()
            by_depth.setdefault(chains[site], []).append(float(apart))
        found[name] = {str(depth): fmean(some) for depth, some in sorted(by_depth.items())}
        print(name, found[name], flush=True)
    return found


def samples(world: World) -> dict[str, Any]:
    """method → prompts → guided held-out error, and the seconds of this thread."""
    methods = {"IterIS": ("iteris", {}), "RegMean": ("regmean", {"shrink": 1.0})}
    held_out = HeldOut(world, PAIR, 8)
    found: dict[str, Any] = {name: {} for name in methods}
    for (name, (method, settings)), count in itertools.product(methods.items(), COUNTS):
        started = time.thread_time()
        merged = merge_loras(
            world.host,
            world.merged_concepts(PAIR, None, 0.0),
            method,
            settings=settings,
            calibration=Calibration(samples=count, latent_size=8, templates=SEEN),
        ).lora
        seconds = time.thread_time() - started
        error = held_out.errors(merged)["guided"]
        found[name][str(count)] = {"error": error, "seconds": seconds}
        print(name, count, found[name][str(count)], flush=True)
    return found


def terms(world: World) -> dict[str, Any]:
    """What is weighed and by what → the share of the larger term, mean over sites and pairs."""
    found: dict[str, list[float]] = {}
    for numbers in PAIRS:
        pair = Pair(world, numbers)
        own = pair.own_inputs()
        for site, module in pair.sites.items():
            for what in ("the LoRAs' changes", "whole weights"):
                sizes, norms = [], []
                for lora, inputs in zip(pair.loras, own, strict=True):
                    weight = lora.sites[site].dense()
                    if what == "whole weights":
                        weight = weight + module.weight.detach().reshape(weight.shape)
                    tokens = site_of(site, module).tokens(inputs[site])
                    sizes.append(float((tokens @ weight.mT).double().square().sum()))
                    norms.append(float(weight.double().square().sum()))
                found.setdefault(f"{what}, no weights", []).append(max(sizes) / sum(sizes))
                found.setdefault(f"{what}, eq. 8", []).append(max(norms) / sum(norms))
    return {name: {"mean": fmean(some), "most": max(some)} for name, some in found.items()}


def bound(world: World) -> dict[str, Any]:
    pair = Pair(world, PAIR)
    chains = depths(pair.all_sites, lambda: pair.forward([0]))
    most = iterations_bound(chains)
    settings = {**PAPER, "schedule": "jacobi", "iterations": most + 2}
    report = merge_loras(
        world.host, pair.concepts, "iteris", settings=settings, calibration=FEW
    ).report
    return {"sites": len(chains), "iterations": most, "moved": list(report.convergence)}


def embedding(world: World) -> dict[str, Any]:
    """What is drawn with → image alignment and the judge's share, mean of both concepts."""
    found: dict[str, dict[str, list[float]]] = {}
    pipeline = world.pipeline
    for token, concept in toybox.pivotal_concepts().items():
        references = world.scorer.embed_images(
            [Image.open(file).convert("RGB") for file in concept.references]
        )
        lora = world.host.read_lora(concept.lora)
        pipeline.load_textual_inversion(str(concept.embedding), token=token)
        for name, word, change in (
            ("neither", concept.class_word, None),
            ("the embedding alone", f"{token} {concept.class_word}", None),
            ("LoRA and embedding", f"{token} {concept.class_word}", lora),
        ):
            pictures = [
                Picture((token,), f"a {word} on a {background} background", seed)
                for background in concept.backgrounds[:4]
                for seed in SEEDS
            ]
            images = world.draw(change, pictures)
            vectors = world.scorer.embed_images(images)
            read = world.judge.read(images)
            entry = found.setdefault(name, {"image": [], "judge": []})
            entry["image"].append(float((references @ vectors.mT).mean()))
            entry["judge"].append(fmean(sum(some.matches(concept.thing)) / 4 for some in read))
            print(token, name, entry, flush=True)
    return {
        name: {column: fmean(some) for column, some in entry.items()}
        for name, entry in found.items()
    }


PARTS: dict[str, Callable[[World], dict[str, Any]]] = {
    part.__name__: part for part in (discrepancy, samples, terms, bound, embedding)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=", ".join(PARTS))
    parts, world = parser.parse_args().parts, World()
    for part in parts:
        found = PARTS[part](world)
        write(FILE, {**read(FILE), part: found})


if __name__ == "__main__":
    main()
