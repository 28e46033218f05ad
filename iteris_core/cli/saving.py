"""The merged LoRA is written, and what is said of it."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ..concepts import Concept
from ..errors import SaveError
from ..lora import Lora
from ..lora_files import Layout, check_writable, write_loras
from ..lora_files.embeddings import embedding_targets
from ..lora_files.experts import expert_files, second_of, split_experts
from ..lora_files.metadata import trigger_phrases
from ..report.provenance import join_embeddings


def save_lora(
    lora: Lora, path: Path, *, layout: Layout | None, dtype: str, overwrite: bool
) -> list[Path]:
    """Write a LoRA to ``path``, or that of two experts to a file each."""
    return write_loras(_files(lora, path), layout=layout, dtype=dtype, overwrite=overwrite)


def _files(lora: Lora, path: Path) -> dict[Path, Lora]:
    denoiser = lora.base.architecture.denoiser if lora.base is not None else ""
    if any(site.startswith(f"{second_of(denoiser)}.") for site in lora.sites):
        return dict(zip(expert_files(path), split_experts(lora, denoiser), strict=True))
    return {path: lora}


def check_merge(
    concepts: Sequence[Concept], path: Path, layout: Layout | None, *, overwrite: bool
) -> None:
    """Raise :class:`IterisError` where the merge of ``concepts`` could not be written to ``path``:
    a site has no name in ``layout``, or a file of an embedding exists."""
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    merged = Lora(
        {site: change for lora in loras for site, change in lora.sites.items()},
        base=next((lora.base for lora in loras if lora.base is not None), None),
        embeddings=join_embeddings(concepts).embeddings,
    )
    for file, part in _files(merged, path).items():
        check_writable(part, file, layout, overwrite=overwrite)


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
