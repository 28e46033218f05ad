"""The merged LoRA is written, and what is said of it."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..errors import SaveError
from ..lora import Lora
from ..lora_files import Layout, write_loras
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
    return write_loras(parts, layout=layout, dtype=dtype, overwrite=overwrite)


def save_or_keep(path: Path, write: Callable[[Path], Sequence[Path]]) -> Sequence[Path]:
    """What ``write`` writes, given ``path``. Where it cannot, it is given that name in the system's
    folder for temporary files, so that hours of merging are not lost, and the error says so."""
    try:
        return write(path)
    except SaveError as error:
        folder = Path(tempfile.gettempdir(), f"iteris-{secrets.token_hex(4)}")
        try:
            folder.mkdir()
            kept = write(folder / path.name)
        except (SaveError, OSError):
            shutil.rmtree(folder, ignore_errors=True)
            raise error from None
        names = " and ".join(map(str, kept))
        raise SaveError(f"{error} The merge is not lost: it is in {names}.") from error


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
