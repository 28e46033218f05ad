"""What the command line says of a merged LoRA's learned embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..lora import Lora
from ..lora_files.embeddings import embedding_targets
from ..lora_files.metadata import trigger_phrases


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
