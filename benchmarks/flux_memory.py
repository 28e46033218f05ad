"""Peak memory of a merge on a FLUX-shaped transformer, beyond the model, and how it grows.

``python benchmarks/flux_memory.py`` writes ``results/flux_memory.json`` as figures come; cases that
stand there already are not run again. The transformer has FLUX.1's width (3072, feed-forward 12288,
so 15360 inputs at the end of a single block) but one double and one single block, with random
weights in bfloat16 and LoRAs on every linear layer of the blocks. Memory of moments and solves
depends on a site's width, not on how many sites there are: one site is solved after the other.
Every case is a process of its own; the peak is its largest resident set less what it had with the
model and the LoRAs loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from outputs import read, result_file, write

FILE = result_file("flux_memory.json")
_WIDEST = {"sites": "single_transformer_blocks.0.proj_out", "settings": {"repair": False}}
CASES: dict[str, dict[str, Any]] = {
    "width 3072, widest site": _WIDEST,
    "width 768": {"width": 768},
    "width 1536": {"width": 1536},
    "width 1536, widest site": {"width": 1536, **_WIDEST},
    "width 1536, widest site, 3 LoRAs": {"width": 1536, "loras": 3, **_WIDEST},
    "width 1536, widest site, 5 LoRAs": {"width": 1536, "loras": 5, **_WIDEST},
    "width 1536, widest site, rank 32": {"width": 1536, "rank": 32, **_WIDEST},
    "width 1536, widest site, adapter": {
        "width": 1536, "sites": _WIDEST["sites"], "settings": {"objective": "adapter"},
    },
    "width 3072, iteris-subspace": {"method": "iteris-subspace"},
    "width 3072": {},
}  # fmt: skip


def resident_gib() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 2**20


def make_pipeline(width: int) -> Any:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from bases import clip_config, clip_words, t5, t5_words
    from transformers import CLIPTextModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel(
            num_layers=1, num_single_layers=1, num_attention_heads=width // 128,
            joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=True,
        )  # fmt: skip
    transformer = transformer.bfloat16().to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in transformer.parameters():
        fan = parameter.shape[-1] if parameter.ndim > 1 else 400
        parameter.data.normal_(std=fan**-0.5, generator=generator)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,
        text_encoder=CLIPTextModel(clip_config(24)).bfloat16().eval(), tokenizer=clip_words(),
        text_encoder_2=t5().bfloat16().eval(), tokenizer_2=t5_words(), transformer=transformer,
    )  # fmt: skip


def run_one(
    width: int = 3072,
    loras: int = 2,
    rank: int = 16,
    method: str = "iteris",
    settings: dict[str, Any] | None = None,
    sites: str = "transformer_blocks.",
) -> dict[str, Any]:
    import torch

    from iteris_core import Calibration, Concept, Lora, LowRank, merge_loras
    from iteris_core.hosts.diffusers import DiffusersHost

    host = DiffusersHost(make_pipeline(width))
    concepts: list[Concept] = []
    for seed in range(loras):
        generator = torch.Generator().manual_seed(seed)
        changes: dict[str, LowRank] = {}
        for site, module in host.sites().items():
            if sites in site:
                out, fan = module.out_features, module.in_features
                up = torch.randn(out, rank, generator=generator)
                down = torch.randn(rank, fan, generator=generator) / (fan * rank) ** 0.5
                changes[site] = LowRank(up * 0.1, down)
        concepts.append(Concept(Lora(changes, f"l{seed}"), prompts=["a dog", "a cat", "a hen"]))
    calibration = Calibration(samples=3, timesteps=1, latents="noise", latent_size=16)
    before, started = resident_gib(), time.perf_counter()
    result = merge_loras(host, concepts, method, settings=settings, calibration=calibration)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "gib_beyond_the_model": round(peak - before, 3),
        "gib_of_model_and_loras": round(before, 3),
        "widest_site": max(c.down.shape[1] for c in result.lora.sites.values()),
        "merged_sites": len(result.lora.sites),
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help="a case as JSON, in this process")
    parser.add_argument("--only", help="cases whose name has this text")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(**json.loads(options.one))))
        return
    results = read(FILE)
    for name, case in CASES.items():
        if name in results or (options.only and options.only not in name):
            continue
        command = [sys.executable, __file__, "--one", json.dumps(case)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[name] = {**case, **json.loads(done.stdout.splitlines()[-1])}
        write(FILE, results)
        print(name, json.dumps(results[name]), flush=True)


if __name__ == "__main__":
    main()
