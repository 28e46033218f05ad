"""The merged LoRA is written, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..lora import Lora
from ..lora_files import Layout, write_lora
from ..lora_files.embeddings import embedding_targets
from ..lora_files.experts import expert_files, second_of, split_experts
from ..lora_files.metadata import trigger_phrases


def save_lora(
    lora: Lora, path: Path, *, layout: Layout | None, dtype: str, overwrite: bool
) -> list[Path]:
    """Write a LoRA to ``path``, or that of two experts to a file each."""
    denoiser = lora.base.architecture.denoiser if lora.base is not None else ""
    parts = {path: lora}
    if any(site.startswith(f"{second_of(denoiser)}.") for site in lora.sites):
        parts = dict(zip(expert_files(path), split_experts(lora, denoiser), strict=True))
    how: dict[str, Any] = {"layout": layout, "dtype": dtype, "overwrite": overwrite}
    return [write_lora(part, target, **how) for target, part in parts.items()]


def lines_of_embeddings(lora: Lora, path: Path) -> Iterator[str]:
    """Where those of the LoRA that was written to ``path`` are, and what calls for them."""
    for name, file in embedding_targets(path, list(lora.embeddings), overwrite=True).items():
        yield f"Its embedding {name} is in {file}: load it beside the LoRA."
    if lora.embeddings:
        said = ", ".join(map(repr, trigger_phrases(lora.metadata)))
        yield (
            f"In a prompt say {said}; in ComfyUI, where the files go into models/embeddings, "
            "embedding:FILE in the place of a name."
        )
