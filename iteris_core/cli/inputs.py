"""Reads the text files and images that options name, and finds mistakes before a base is loaded:
in LoRA files, trigger words and output paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..concepts import Concept, lines_of
from ..errors import ConceptError, InputFileError, LoraFileError, OutputError, brief
from ..lora import Lora
from ..lora_files import Layout, is_lora, read_header, read_tensors
from ..lora_files.blocks import weights_by_block
from ..lora_files.embeddings import embedding_files, split_embeddings
from ..lora_files.experts import by_expert, expert_files
from ..lora_files.formulas import check_whole
from ..report.provenance import join_embeddings, shared_triggers
from ..saving import check_new

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FEW = 8
"""Most tensors in a file of embeddings; a model has more."""


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file, stripped, without empty ones."""
    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file.")
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputFileError(
            f"{path} is not text in UTF-8 (byte {error.start}); save it again as UTF-8."
        ) from error
    if "\0" in text:
        raise InputFileError(f"{path} is not a text file: it contains null bytes.")
    return lines_of(text)


def open_picture(path: Path) -> Any:
    """An RGB image. Raises :class:`IterisError` if the file is not one."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:  # includes Pillow's errors
        raise InputFileError(f"{path} is not a readable image ({brief(error)}).") from error


def open_images(*paths: Path) -> tuple[list[Path], list[Any]]:
    """Files and their images: single files, and all images of a folder by name."""
    listed: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files = [path] if path.is_file() else [f for f in inside if f.suffix.lower() in _IMAGES]
        if not files:
            kinds = ", ".join(_IMAGES)
            raise InputFileError(f"{path} is neither an image nor a folder of images ({kinds}).")
        listed += files
    return listed, [open_picture(file) for file in listed]


def check_concepts(concepts: Sequence[Concept]) -> list[Concept]:
    """Raise :class:`IterisError` for a missing file, one that is not a LoRA or a broken one, with
    NaN or missing parts.

    Returns the concepts that have a file, with what needs no base of their LoRAs: metadata and
    embeddings.
    """
    if concepts and not any(concept.is_active for concept in concepts):
        raise ConceptError("There is nothing to merge: every concept has strength or weight 0.")
    read: list[Concept] = []
    for concept in concepts:
        for file in concept.files:
            shapes, _ = read_header(file)
            if not shapes:
                raise LoraFileError(f"{file} contains no tensors; it is not a LoRA file.")
            if not is_lora(shapes):
                whole = len(shapes) > _FEW
                what = "a whole model (a checkpoint)" if whole else "another kind of file"
                raise LoraFileError(
                    f"{file} is {what}, not a LoRA: its first tensor is {min(shapes)}. Give the "
                    "LoRA's own file."
                )
            tensors, metadata = read_tensors(file)
            embeddings, tensors, _ = split_embeddings(file, tensors, metadata)
            check_whole(file, tensors)
            if file == concept.file:  # of two experts, the first has the words
                lora = Lora({}, file.stem, metadata, embeddings=embeddings)
                read.append(replace(concept, lora=lora))
        if concept.blocks and not any(weights_by_block(concept.blocks).values()):
            raise ConceptError(
                f"{concept.name}: blocks={concept.blocks!r} leaves nothing of it; leave it out, or "
                "give a block another weight."
            )
        if concept.prompts is not None and not concept.prompts:
            raise ConceptError(f"{concept.name}: its list of prompts is empty.")
    return read


def check_used(concept: Concept, *unused: str, what: str) -> None:
    """Raise :class:`ConceptError` if fields of ``concept`` that count for nothing in ``what`` are
    given."""
    given = [name for name in unused if name in concept.stated]
    if given:
        raise ConceptError(
            f"{concept.name}: {' and '.join(given)} does not count in {what}; leave it out."
        )


def check_apart(outputs: Iterable[Path], *inputs: str | Path | None) -> None:
    """Raise :class:`IterisError` if a result would overwrite what it is made of."""
    files = [Path(path) for path in inputs if path and Path(path).exists()]
    for output in filter(Path.exists, outputs):
        if any(output.samefile(file) for file in files):
            raise OutputError(
                f"{output} is an input, which would be lost; choose another name for the result."
            )


def check_embeddings(
    concepts: Sequence[Concept], output: Path, layout: Layout | None, *, overwrite: bool
) -> list[Path]:
    """Refuse embeddings that cannot be written beside ``output``, and a base without names; returns
    their files."""
    loras = [concept.lora for concept in concepts if concept.lora is not None]
    beside = expert_files(output)[0] if any(len(by_expert(lora)) > 1 for lora in loras) else output
    files = list(embedding_files(beside, list(join_embeddings(concepts)[0])).values())
    for file in files:
        check_new(file, overwrite=overwrite)
    for base in (lora.base for lora in loras):
        if layout == "kohya" and base is not None and not base.written:
            raise OutputError(
                f"A base of {base.architecture.title} has no names in kohya layout; omit --layout, "
                "or give peft."
            )
    return files


def warnings_of(concepts: Sequence[Concept]) -> Iterator[str]:
    """A sentence for each concept that is probably a mistake."""
    counting = [concept for concept in concepts if concept.is_active]
    for concept, shared in zip(counting, shared_triggers(counting), strict=True):
        yield from (f"{concept.name}: {note}." for note in shared)
        trigger = " ".join(concept.trigger.lower().split())
        prompts = () if concept.preserves else concept.prompts or ()
        if trigger and prompts and not any(trigger in prompt.lower() for prompt in prompts):
            yield (
                f"None of the {len(prompts)} prompts of {concept.name} contains its trigger "
                f"{concept.trigger!r}: the merge fits what they show, which may not be the concept."
            )
