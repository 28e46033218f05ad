"""Checks before a base is loaded: LoRA files, trigger words, and output paths."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..concepts import Concept
from ..config import ConceptConfig
from ..errors import ConceptError, LoraFileError, OutputError
from ..lora import Lora
from ..lora_files import Layout, is_lora, read_header, read_tensors
from ..lora_files.blocks import weights_by_block
from ..lora_files.embeddings import embedding_targets, split_embeddings
from ..lora_files.experts import by_expert, expert_files
from ..lora_files.formulas import check_whole
from ..report.provenance import join_embeddings, shared_triggers

_FEW = 8
"""Most tensors in a file of embeddings; a model has more."""


def check_concepts(concepts: Sequence[ConceptConfig]) -> list[Concept]:
    """Raise :class:`IterisError` for a missing file, one that is not a LoRA or a broken one.

    Returns the concepts that have a file, with what needs no base of their LoRAs: metadata and
    embeddings.
    """
    if concepts and not any(option.counts for option in concepts):
        raise ConceptError("There is nothing to merge: every concept has strength or weight 0.")
    read: list[Concept] = []
    for option in concepts:
        loras = [_checked_lora(file) for file in option.files]
        read += [option.concept(lora) for lora in loras[:1]]
        if option.blocks and not any(weights_by_block(option.blocks).values()):
            raise ConceptError(
                f"{option.name}: blocks={option.blocks!r} leaves nothing of it; leave it out, or "
                "give a block another weight."
            )
        if option.prompts is not None and not option.prompts:
            raise ConceptError(f"{option.name}: its list of prompts is empty.")
    return read


def _checked_lora(file: Path) -> Lora:
    """The metadata and embeddings of a LoRA file. Raises :class:`LoraFileError` for any other kind
    of file, for NaN and for missing parts."""
    shapes, _ = read_header(file)
    if not shapes:
        raise LoraFileError(f"{file} contains no tensors; it is not a LoRA file.")
    if not is_lora(shapes):
        what = "a whole model (a checkpoint)" if len(shapes) > _FEW else "another kind of file"
        raise LoraFileError(
            f"{file} is {what}, not a LoRA: its first tensor is {min(shapes)}. Give the LoRA's own "
            "file."
        )
    tensors, metadata = read_tensors(file)
    embeddings, tensors, _ = split_embeddings(file, tensors, metadata)
    check_whole(file, tensors)
    return Lora({}, file.stem, metadata, embeddings=embeddings)


def check_apart(outputs: Sequence[Path], concepts: Sequence[ConceptConfig]) -> None:
    """Raise :class:`IterisError` if the result would overwrite one of the LoRAs."""
    for option in concepts:
        for file in option.files:
            for output in outputs:
                if output.exists() and file.exists() and output.samefile(file):
                    raise OutputError(
                        f"{output} is one of the LoRAs to merge and would be lost; choose another "
                        "name for the result."
                    )


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


def room_warnings(output: Path, concepts: Sequence[ConceptConfig]) -> Iterator[str]:
    """A sentence if the disk has less room than the LoRAs take; a merge is about as large."""
    size = sum(file.stat().st_size for option in concepts for file in option.files)
    free = shutil.disk_usage(output.resolve().parent).free
    if free < size:
        yield (
            f"{output} may not fit: its disk has {free / 1e6:.1f} MB free, and the LoRAs take "
            f"{size / 1e6:.1f} MB. A lower rank makes it smaller."
        )


def warnings_of(concepts: Sequence[ConceptConfig]) -> Iterator[str]:
    """One sentence per concept that is probably a mistake."""
    for option in concepts:
        if not option.counts:
            what = "strength" if option.weight else "weight"
            yield f"{option.name} is left out of the merge: its {what} is 0."
    counting = [option for option in concepts if option.counts]
    for option, shared in zip(counting, shared_triggers(counting), strict=True):
        yield from (f"{option.name}: {note}." for note in shared)
        trigger = " ".join(option.trigger.lower().split())
        prompts = () if option.preserves else option.prompts or ()
        if trigger and prompts and not any(trigger in prompt.lower() for prompt in prompts):
            yield (
                f"None of the {len(prompts)} prompts of {option.name} contains its trigger "
                f"{option.trigger!r}: the merge fits what they show, which may not be the concept."
            )
