"""End to end against peers, on a full-size SD 1.5 architecture with random weights.

- SSR-Merge's own core (``SSR_MERGE_PATH``, a checkout) on the same UNet, LoRAs, prompts and
  latents: each LoRA in turn on the weights, one forward of its rows, then their solve.
- peft's ``add_weighted_adapter`` (svd, ties, cat) against our ``svd``, ``ties`` and ``sum``.
"""

from __future__ import annotations

import os
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rivals  # noqa: F401 (registers them)
import torch
from models import in_turn, medians, prompt_concepts, sd15_host
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraModel

from iteris_core import Calibration, Concept, merge_loras
from iteris_core.passes.job import Job

RANK = 32


def ssr(rounds: int, counts: Sequence[int], latent_size: int = 16) -> dict[str, Any]:
    """K → seconds of SSR-Merge's core, of our ``ssr`` and of ``iteris`` (twice the rows: its merged
    copies; and the text encoder, X̃ and repair)."""
    core = runpy.run_path(str(Path(os.environ["SSR_MERGE_PATH"]) / "ssr_merge" / "core.py"))
    host = sd15_host()
    calibration = Calibration(
        samples=4, timesteps=1, latents="noise", latent_size=latent_size, empty_share=0.0
    )
    found: dict[str, Any] = {}
    for count in counts:
        concepts = [_unet_only(concept) for concept in prompt_concepts(host, count, RANK)]

        def merge(method: str, some: Sequence[Concept] = concepts, **settings: Any) -> Any:
            return lambda: merge_loras(
                host,
                some,
                method,
                settings=settings,
                calibration=calibration,
                memory_budget=None,
            )

        seconds = medians(
            in_turn(
                {
                    "SSR-Merge's core": lambda c=concepts: _ssr_core(core, host, c, calibration),
                    "ours, ssr": merge("ssr"),
                    "ours, iteris": merge("iteris"),
                    "ours, iteris without repair": merge("iteris", repair=False),
                },
                rounds,
                warm=False,
            )
        )
        peer = seconds["SSR-Merge's core"]
        found[str(count)] = {**seconds, "ratio": peer / seconds["ours, iteris"],
                             "ratio of ssr": peer / seconds["ours, ssr"]}  # fmt: skip
    return found


def _unet_only(concept: Concept) -> Concept:
    assert concept.lora is not None
    sites = {site: c for site, c in concept.lora.sites.items() if site.startswith("unet.")}
    return Concept(
        type(concept.lora)(sites, concept.name), trigger=concept.trigger, class_word="cat"
    )


def _ssr_core(core: Any, host: Any, concepts: Sequence[Concept], calibration: Any) -> Any:
    sites = list(concepts[0].lora.sites)
    pairs = [{s: (c.lora.sites[s].down, c.lora.sites[s].up) for s in sites} for c in concepts]
    references = {site: [c.lora.sites[site] for c in concepts] for site in sites}
    generator = torch.Generator().manual_seed(0)
    task = Job(host, concepts, references, calibration, generator, lambda *_: None)
    modules = host.sites()
    merger = core["SSRMerger"](pairs, lambda_reg=1e-4)
    with torch.no_grad(), task.run() as run:
        run.lockstep.close()
        samples = run.samples
        denoiser = _encoded(host, samples, set(sites))
        rows = list(range(len(denoiser.owners)))
        for index, concept in enumerate(concepts):
            for site, change in concept.lora.sites.items():
                modules[site].weight.addmm_(change.up, change.down)
            merger.attach({site: modules[site] for site in sites})
            merger.set_active_task(index)
            denoiser.run([row for row in rows if denoiser.owners[row] == index], 1)
            merger.detach()
            for site, change in concept.lora.sites.items():
                modules[site].weight.addmm_(change.up, change.down, alpha=-1.0)
    return merger.solve()


def _encoded(host: Any, samples: Any, sites: set[str]) -> Any:
    """The denoiser's stage, with the prompts encoded."""
    for stage in host.stages(samples, sites):
        if stage.name != "text encoder":
            return stage
        stage.run(range(len(stage.concept_ids)), 1)
    raise RuntimeError("no denoiser")


def peft_library(rounds: int) -> dict[str, Any]:
    """Two LoRAs of rank 32 on the UNet's attention, weights alone."""
    host = sd15_host()
    concepts = [_unet_only(concept) for concept in prompt_concepts(host, 2, RANK)]
    targets = [site.removeprefix("unet.") for site in concepts[0].lora.sites]
    unet = host.pipeline.unet
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    for index, concept in enumerate(concepts):
        inject_adapter_in_model(config, unet, f"lora{index}")
        for site, change in concept.lora.sites.items():
            layer = unet.get_submodule(site.removeprefix("unet."))
            layer.lora_A[f"lora{index}"].weight.data.copy_(change.down)
            layer.lora_B[f"lora{index}"].weight.data.copy_(change.up)
    tuner = LoraModel(unet, {f"lora{i}": config for i in range(2)}, "lora0")
    options = {
        "svd": {"svd_rank": RANK, "svd_full_matrices": False},
        "ties": {"density": 0.5},
        "cat": {},
    }
    ours = {"svd": ("svd", {"rank": RANK}), "ties": ("ties", {"density": 0.5}), "cat": ("sum", {})}

    def theirs(kind: str) -> Callable[[], Any]:
        def run() -> None:
            tuner.add_weighted_adapter(
                ["lora0", "lora1"], [1.0, 1.0], "merged", kind, **options[kind]
            )
            tuner.delete_adapter("merged")

        return run

    found: dict[str, Any] = {}
    for kind, (method, settings) in ours.items():
        seconds = medians(
            in_turn(
                {
                    "peft": theirs(kind),
                    "ours": lambda m=method, s=settings: merge_loras(None, concepts, m, settings=s),
                },
                rounds if kind != "svd" else 1,
            )
        )
        found[kind] = {**seconds, "ratio": seconds["peft"] / seconds["ours"]}
    return found
