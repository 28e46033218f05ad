"""Weighted against plain truncation on the toybox: output error at equal rank.

``python benchmarks/truncation.py`` writes ``benchmarks/results/truncation.json``. The sum of two
concepts' LoRAs (rank 16 at every site) is cut to each rank by plain SVD and by the SVD that is
weighted with the second moments of the sites' inputs. The error is ‖X (ΔW − ΔW_k)ᵀ‖ / ‖X ΔWᵀ‖, root
mean square over the sites, on inputs of other prompts and seeds than those that made the weights.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from outputs import result_file, write
from torch import Tensor

import toybox
from iteris_core import Concept, merge_loras
from iteris_core.activations.site import site_of
from iteris_core.hosts.diffusers_lora import pipeline_sites, read_lora
from iteris_core.linalg.lowrank import cut_factors
from toybox import TEMPLATES

RANKS = (1, 2, 4, 6, 8, 12)


def collect(
    pipeline: Any, sites: Sequence[str], prompts: list[str], seed: int
) -> dict[str, Tensor]:
    """XᵀX of every site over one picture per prompt, with the LoRA that is loaded now."""
    moments: dict[str, Tensor] = {}
    modules = pipeline_sites(pipeline)

    def watch(site: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            x = site_of(site, module).tokens(args[0]).double()
            moments[site] = moments.get(site, 0) + x.mT @ x

        return modules[site].register_forward_pre_hook(hook)

    handles = [watch(site) for site in sites]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        pipeline(prompts, num_inference_steps=6, generator=generator, output_type="latent")
    for handle in handles:
        handle.remove()
    return moments


def measure(names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Errors by rank: {"8": {"plain": …, "weighted": …}, …}"""
    concepts = [toybox.concepts()[name] for name in names]
    pipeline = toybox.load_pipeline()
    sites = pipeline_sites(pipeline)
    loras = [read_lora(pipeline, sites, concept.lora) for concept in concepts]
    merged = merge_loras(None, [Concept(lora) for lora in loras], "sum").lora
    words = [f"{concept.token} {concept.class_word}" for concept in concepts]
    prompts = [template.format(word) for word in words for template in TEMPLATES]
    first = collect(pipeline, list(merged.sites), prompts[::2], 1)
    second = collect(pipeline, list(merged.sites), prompts[1::2], 2)
    table: dict[str, dict[str, float]] = {}
    for rank in RANKS:
        errors = {"plain": 0.0, "weighted": 0.0}
        for site, change in merged.sites.items():
            moment = first[site]
            ridge = 1e-5 * float(moment.norm())
            metric = torch.linalg.cholesky(moment + ridge * torch.eye(len(moment)))
            dense = change.dense().double()
            total = float(((dense @ second[site]) * dense).sum())
            for name, weight in (("plain", None), ("weighted", metric)):
                cut, _ = cut_factors(change, rank, weight)
                off = dense - cut.dense().double()
                errors[name] += float(((off @ second[site]) * off).sum()) / total
        count = len(merged.sites)
        table[str(rank)] = {name: (error / count) ** 0.5 for name, error in errors.items()}
    return table


def main() -> None:
    names = sys.argv[1:] or list(toybox.concepts())[:2]
    data = {"concepts": names, "error": measure(names)}
    print(json.dumps(data, indent=1))
    write(result_file("truncation.json", whole=len(sys.argv) == 1), data)


if __name__ == "__main__":
    main()
