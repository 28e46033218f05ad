"""``iteris init``"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..presets import PRESETS
from .common import console, option
from .folder import FoundLora, base_near, loras_in
from .merge_file import check_merge_file, relative_name, to_yaml, write_merge_file

_LEAVE_OUT = "-"


def init(
    folder: Annotated[Path, typer.Argument(help="A folder of LoRAs", metavar="FOLDER")],
    output: Annotated[Path, option("The merge file to write", "--output", "-o")] = Path(
        "merge.yaml"
    ),
    base: Annotated[
        str | None,
        option("The base model, if it is not the pipeline beside the LoRAs or the usual one"),
    ] = None,
    yes: Annotated[bool, option("Ask nothing; accept every guess", "--yes", "-y")] = False,
    overwrite: Annotated[bool, option("Replace an existing merge file", "--overwrite")] = False,
) -> None:
    """Write a merge file from a folder of LoRAs.

    Trigger words come from the files' metadata and from the notes that download helpers leave
    beside them; the base model is guessed from the names in the files. In a terminal you can accept
    or change every guess.

    \b
    iteris init loras
    iteris init loras --base models/sdxl -o people.yaml --yes
    """
    loras, left_out = loras_in(folder)
    check_merge_file(output, overwrite=overwrite)
    base_name, how = (base, "") if base is not None else base_near(folder, loras[0].family)
    if not yes and sys.stdin.isatty():
        base_name, loras = _ask(base_name, loras)
        how = how if base_name else "none given"
    write_merge_file(output, _text(output, base_name, how, loras))
    for name, why in left_out.items():
        console.print(f"Left out: {name} ({why}).", style="yellow", markup=False, highlight=False)
    typer.echo(f"Wrote {output}: {len(loras)} LoRAs for {loras[0].family}.")
    todo = [f"base: ({how})"] if not base_name else []
    if wordless := [one.name for one in loras if not one.option.phrases]:
        which = ", ".join(wordless)
        typer.echo(f"Without trigger words, so acting on every prompt: {which}. Type those it has.")
    if todo:
        typer.echo(f"Fill in {', '.join(todo)}. Then merge: iteris merge {output}")
    else:
        typer.echo(f"Check its trigger words, then merge: iteris merge {output}")


def _ask(base: str, loras: Sequence[FoundLora]) -> tuple[str, list[FoundLora]]:
    """``base`` and the trigger words, after the user accepts or changes them."""
    typer.echo(
        f"{len(loras)} LoRAs for {loras[0].family}. Press Enter to accept the value in brackets."
    )
    base = typer.prompt("Base model", default=base or None)
    typer.echo(f"Trigger words of each LoRA, such as: sks cat ({_LEAVE_OUT} leaves out)")
    kept: list[FoundLora] = []
    for one in loras:
        known = ", ".join(one.option.phrases)
        answer = str(typer.prompt(one.name, default=known, show_default=bool(known))).strip()
        if answer == _LEAVE_OUT:
            continue
        if answer != known:
            phrases = [phrase.strip() for phrase in answer.split(",") if phrase.strip()]
            one = replace(one, option=one.option.called(phrases), source="words as you typed them")
        kept.append(one)
    if not kept:
        raise UsageError("Every LoRA was left out; nothing was written.")
    return base, kept


def _text(output: Path, base: str, how: str, loras: Sequence[FoundLora]) -> str:
    """The merge file's text, with comments on what was guessed."""
    folder = output.parent

    def name(path: Path) -> str:
        return relative_name(path, folder)

    names = ["merged.safetensors", *(f"merged-{number}.safetensors" for number in range(2, 1000))]
    free = next(name for name in names if not (folder / name).exists())
    where = to_yaml(name(Path(base))).splitlines()[0] if base else ""
    lines = [
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
        lines += [f"  {line}" for line in to_yaml([entry]).splitlines()]
    return "\n".join(lines) + "\n"
