"""``iteris init``"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..errors import OutputError
from ..presets import PRESETS
from ..saving import atomically, check_new
from .base import BUNDLED
from .common import warn
from .folder import FoundLora, base_near, loras_in
from .merge_file import SUFFIXES
from .options import option


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

    names = ["merged.safetensors", *(f"merged-{number}.safetensors" for number in range(2, 1000))]
    free = next(name for name in names if not (folder / name).exists())
    where = _yaml(name(Path(base))).splitlines()[0] if base else ""
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
        lines += [f"  {line}" for line in _yaml([entry]).splitlines()]
    return "\n".join(lines) + "\n"


def _yaml(data: Any) -> str:
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
