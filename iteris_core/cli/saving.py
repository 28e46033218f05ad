"""Writes the merged LoRA, and the lines about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.markup import escape

from ..concepts import Concept
from ..errors import IterisError, OutputError, SaveError
from ..lora import Lora
from ..lora_files import Layout
from ..lora_files.embeddings import embedding_targets
from ..lora_files.experts import by_expert, expert_files, write_by_expert
from ..lora_files.metadata import trigger_phrases
from ..report.provenance import join_embeddings
from ..saving import rescued
from .common import console


def save_lora(
    lora: Lora, overwrite: bool, path: Path, layout: Layout | None, dtype: str
) -> list[Path]:
    """Write a LoRA to ``path``; a LoRA for two experts becomes two files."""
    return write_by_expert(lora, path, layout=layout, dtype=dtype, overwrite=overwrite)


def check_embeddings(
    concepts: Sequence[Concept], output: Path, layout: Layout | None, *, overwrite: bool
) -> None:
    """Raise :class:`IterisError` before the merge if its embeddings cannot be written beside
    ``output``, or its base has no names in ``layout``."""
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    beside = expert_files(output)[0] if any(len(by_expert(lora)) > 1 for lora in loras) else output
    embedding_targets(beside, list(join_embeddings(concepts).embeddings), overwrite)
    for base in (lora.base for lora in loras):
        if layout == "kohya" and base is not None and not base.written:
            raise OutputError(
                f"A base of {base.architecture.title} has no names in kohya layout; omit --layout, "
                "or give peft."
            )


Write = Callable[[Path, Layout | None, str], Sequence[Path]]
"""``write(path, layout, dtype)`` returns what it wrote."""


def save_or_keep(path: Path, write: Write, layout: Layout | None, dtype: str) -> Sequence[Path]:
    """Call ``write`` so that hours of merging are not lost; return the paths.

    Values that do not fit in ``dtype`` are written as float32. If ``path`` or ``layout`` cannot be
    written at all, the merge goes into the system's folder for temporary files, in the base's own
    layout as float32, and the error says where it is.
    """

    def kept(error: IterisError) -> IterisError:
        return rescued(lambda other: write(other, None, "float32"), path.name, error)

    try:
        return write(path, layout, dtype)
    except SaveError as error:
        raise kept(error) from error
    except IterisError as error:
        if dtype == "float32":
            raise kept(error) from error
        first = error
    try:
        paths = write(path, layout, "float32")
    except IterisError as error:
        raise kept(error) from first
    console.print(f"Written as float32, not {dtype}: {escape(str(first))}", style="yellow")
    return paths


def lines_of_embeddings(lora: Lora, path: Path) -> Iterator[str]:
    """Lines about the embeddings of the LoRA in ``path``: their files and trigger words."""
    for name, file in embedding_targets(path, list(lora.embeddings), overwrite=True).items():
        yield f"Its embedding {name} is in {file}: load it beside the LoRA."
    if lora.embeddings:
        phrases = ", ".join(map(repr, trigger_phrases(lora.metadata)))
        yield (
            f"In prompts write {phrases}; in ComfyUI put the files into models/embeddings and "
            "write embedding:FILE in place of a name."
        )
