"""Random LoRA files for any pipeline, as peft and diffusers write them."""

import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from iteris_core import Concept, Lora
from iteris_core.hosts.diffusers import DiffusersHost
from iteris_core.hosts.diffusers_lora import COMPONENTS, loaded_components, pipeline_sites
from iteris_core.lora_files.experts import joined_experts

from .reduced import Reduced

PARTS = re.compile(r"attn|attention|\.ff|ffn|feed_forward|mlp|\.fc[12]$", re.IGNORECASE)


def lora_tensors(pipeline: Any, seed: int = 1, rank: int = 2, size: float = 0.5):
    """Of every linear layer of attention and feed-forward, in peft's layout."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for component in loaded_components(pipeline):
        if component == "transformer_2" or component not in COMPONENTS:
            continue
        for name, module in getattr(pipeline, component).named_modules():
            if not isinstance(module, nn.Linear) or not PARTS.search(f".{name}"):
                continue
            if component.startswith("text_encoder") and name.startswith("encoder."):
                name = f"text_model.{name}"
            wide, high = module.in_features, module.out_features
            down = torch.randn(rank, wide, generator=generator) / wide**0.5
            up = torch.randn(high, rank, generator=generator) * size / rank**0.5
            tensors[f"{component}.{name}.lora_A.weight"] = down
            tensors[f"{component}.{name}.lora_B.weight"] = up
    return tensors


def write_lora(path: str | Path, pipeline: Any, seed: int = 1, rank: int = 2) -> Path:
    """A random LoRA of the pipeline's denoiser and of the text encoders that it is loaded with."""
    save_file(lora_tensors(pipeline, seed, rank), path)
    return Path(path)


def two_concepts(reduced: Reduced, folder: Path) -> tuple[DiffusersHost, list[Concept]]:
    """A host of the pipeline, and two random LoRAs with its prompts; of each expert the same."""
    host = DiffusersHost(reduced.pipeline, **reduced.call)
    files = [write_lora(folder / f"{seed}.safetensors", reduced.pipeline, seed) for seed in (1, 2)]
    loras = [host.read_lora(file) for file in files]
    if host.experts:
        loras = [joined_experts(lora, lora, host.experts) for lora in loras]
    return host, [Concept(lora, prompts=list(reduced.prompts)) for lora in loras]


@contextmanager
def applied(pipeline: Any, lora: Lora) -> Generator[None]:
    """The pipeline with the LoRA's changes added to its weights."""
    sites = pipeline_sites(pipeline)
    before = {site: sites[site].weight.detach().clone() for site in lora.sites}
    try:
        for site, change in lora.sites.items():
            sites[site].weight.data += change.dense().reshape(before[site].shape)
        yield
    finally:
        for site, weight in before.items():
            sites[site].weight.data.copy_(weight)


@contextmanager
def loaded(pipeline: Any, path: str | Path, *, second: bool = False) -> Generator[None]:
    """The pipeline with a file as its own loader loads it, into the ``second`` expert if so."""
    pipeline.load_lora_weights(str(path), **({"load_into_transformer_2": True} if second else {}))
    try:
        yield
    finally:
        pipeline.unload_lora_weights()
