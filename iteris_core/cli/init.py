"""``iteris init``: which files in a folder are LoRAs, for which base, and with which words."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..architectures import architecture_of_file, said_base
from ..config import ConceptConfig
from ..errors import InputFileError, LoraFileError, OutputError
from ..lora_files import is_lora, read_header
from ..lora_files.metadata import parse_object
from ..saving import atomically, check_new
from ..settings import PRESETS
from .base import BUNDLED, INDEXES, named_base
from .common import warn
from .merge_file import SUFFIXES
from .options import option

_HUB = {
    "SD 1.x": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "SDXL": "stabilityai/stable-diffusion-xl-base-1.0",
    "FLUX.1": "black-forest-labs/FLUX.1-dev",
}
"""Family → the base on which most of its LoRAs are trained; SD 2 and SD 3 have several."""
_SOURCES = {
    "file": "words from the file's metadata",
    "captions": "words guessed from the captions in the file's metadata",
    "": "no trigger words: it acts on every prompt, such as a style; if it has one, type it",
}


def init(
    folder: Annotated[Path, typer.Argument(help="A folder of LoRAs", metavar="FOLDER")],
    output: Annotated[Path, option("The merge file to write", "--output", "-o")] = Path(
        "merge.yaml"
    ),
    base: Annotated[
        str | None,
        option("The base model, if it is not the pipeline beside the LoRAs or the usual one"),
    ] = None,
    overwrite: Annotated[bool, option("Replace an existing merge file", "--overwrite")] = False,
) -> None:
    """Write a merge file from a folder of LoRAs, to check and then to merge.

    Trigger words come from the files' metadata and from the notes that download helpers leave
    beside them; the base model is guessed from the names in the files.

    \b
    iteris init loras
    iteris init loras --base models/sdxl -o people.yaml
    """
    loras, left_out = loras_in(folder)
    if output.suffix not in SUFFIXES:
        raise OutputError(
            f"{output}: the name of a merge file must end in {' or '.join(SUFFIXES)}."
        )
    check_new(output, overwrite=overwrite)
    base_name, how = (base, "") if base is not None else base_near(folder, loras[0].family)
    with atomically(output) as unfinished:
        unfinished.write_text(_text(output, base_name, how, loras), encoding="utf-8")
    for name, why in left_out.items():
        warn(f"Left out: {name} ({why}).")
    typer.echo(f"Wrote {output}: {len(loras)} LoRAs for {loras[0].family}.")
    if wordless := [one.name for one in loras if not one.option.phrases]:
        which = ", ".join(wordless)
        typer.echo(f"Without trigger words, so acting on every prompt: {which}. Type those it has.")
    todo = "Check its trigger words" if base_name else f"Fill in base: ({how})"
    typer.echo(f"{todo}, then merge: iteris merge {output}")


def _text(output: Path, base: str, how: str, loras: Sequence[FoundLora]) -> str:
    """The merge file's text, with comments on what was guessed."""
    folder = output.parent

    def name(path: Path) -> str:
        """A path relative to the merge file; a hub name or a bundled base's stays as it is."""
        stays = str(path) in BUNDLED or not path.exists()
        return (path if stays else Path(os.path.relpath(path, folder))).as_posix()

    def in_yaml(data: Any) -> list[str]:
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
        return text.splitlines()

    names = ["merged.safetensors", *(f"merged-{number}.safetensors" for number in range(2, 1000))]
    free = next(name for name in names if not (folder / name).exists())
    where = in_yaml(name(Path(base)))[0] if base else ""
    lines = [
        f"# iteris merge {output.name}",
        f"base: {where}" + (f"  # {how}" if how else ""),
        f"output: {free}",
        f"preset: default  # or {', '.join(name for name in PRESETS if name != 'default')}",
        "concepts:",
    ]
    for one in loras:
        entry = one.option.to_dict(name, usual=False)
        if not one.option.phrases:
            entry |= {"trigger": "", "class": ""}  # the class word, which may stay empty
        lines.append(f"  # {one.source}")
        lines += [f"  {line}" for line in in_yaml([entry])]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class FoundLora:
    """``family`` is an architecture's title or a bundled base; ``source`` tells of its words."""

    option: ConceptConfig
    family: str
    source: str
    folder: Path

    @property
    def name(self) -> str:
        return " + ".join(file.relative_to(self.folder).as_posix() for file in self.option.files)


def loras_in(folder: Path) -> tuple[list[FoundLora], dict[str, str]]:
    """The LoRAs of the most common family in ``folder`` and its subfolders, by name, and why other
    files are left out. Pipelines and hidden folders are skipped.

    Raises :class:`IterisError` if there is no LoRA.
    """
    if not folder.is_dir():
        raise InputFileError(f"{folder} is not a folder; give the folder with your LoRAs.")
    loras: list[FoundLora] = []
    left_out: dict[str, str] = {}
    for file in _files_in(folder):
        try:
            loras.append(_look_at(file, folder))
        except LoraFileError as error:
            left_out[file.relative_to(folder).as_posix()] = str(error)
    if not loras:
        seen = "; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no .safetensors"
        raise InputFileError(f"{folder} contains no LoRA ({seen}).")
    family = Counter(one.family for one in loras).most_common(1)[0][0]
    for one in loras:
        if one.family != family:
            left_out[one.name] = f"made for {one.family}, the others for {family}"
    return _pairs([one for one in loras if one.family == family]), left_out


def _files_in(folder: Path) -> Iterator[Path]:
    seen = set[str]()  # links may go round in a circle
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        ends = real in seen or any(name in names for name in INDEXES)
        folders[:] = [] if ends else sorted(n for n in folders if not n.startswith("."))
        if real not in seen:
            yield from (Path(parent, n) for n in sorted(names) if n.endswith(".safetensors"))
        seen.add(real)


def _look_at(file: Path, folder: Path) -> FoundLora:
    """The LoRA in ``file``. Raises :class:`LoraFileError` that says what the file is instead."""
    shapes, metadata = read_header(file)
    if not is_lora(shapes):
        raise LoraFileError("no LoRA")
    if "method" in parse_object(metadata.get("iteris")):
        raise LoraFileError("a merge that iteris wrote")
    try:
        family = named_base(metadata) or architecture_of_file(shapes, metadata).title
    except LoraFileError:
        family = said_base(metadata) or "an unknown base model"
    option = ConceptConfig(file=file).with_found_words(metadata)
    source = _SOURCES.get(option.source, f"words from {file.stem}{option.source}")
    return FoundLora(option, family, source, folder)


def _pairs(loras: Sequence[FoundLora]) -> list[FoundLora]:
    """``loras``, with the two files of a model with two experts joined into one entry."""
    by_name = {one.name: one for one in loras}
    words = {"HIGH": "LOW", "High": "Low"}
    low_of = {
        name: re.sub("(?i)high", lambda high: words.get(high[0], "low"), name) for name in by_name
    }
    lows = {low for name, low in low_of.items() if low != name and low in by_name}
    joined: list[FoundLora] = []
    for name, one in by_name.items():
        if name in lows:
            continue
        if low_of[name] in lows:
            low = by_name[low_of[name]].option.file
            one = replace(one, option=one.option.model_copy(update={"low": low}))
        joined.append(one)
    return joined


def base_near(folder: Path, family: str) -> tuple[str, str]:
    """The base for LoRAs of ``family``, and how it was found: the bundled base that they name, a
    diffusers pipeline in ``folder`` or beside it, or the released model; empty if none is clear."""
    if family in BUNDLED:
        return family, "named in the files; it ships with iteris"
    near = [folder, folder.absolute().parent]
    indexes = [path for place in near for name in INDEXES for path in place.glob(f"*/{name}")]
    pipelines = sorted({path.parent for path in indexes})
    if len(pipelines) == 1:
        return str(pipelines[0]), "the pipeline beside the LoRAs"
    if family in _HUB:
        return _HUB[family], f"the usual base of {family} LoRAs, from the hub"
    return "", f"none found; name one for LoRAs of {family}"
