"""peft's ``add_weighted_adapter`` (svd, ties, cat) against our ``svd``, ``ties`` and ``sum``, on a
full-size SD 1.5 architecture with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from models import denoiser_only, in_turn, medians, prompt_concepts, sd15_host
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraModel

from iteris_core import merge_loras

RANK = 32


def peft_library(rounds: int) -> dict[str, Any]:
    """Two LoRAs of rank 32 on the UNet's attention, weights alone."""
    host = sd15_host()
    concepts = [denoiser_only(concept) for concept in prompt_concepts(host, 2, RANK)]
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
