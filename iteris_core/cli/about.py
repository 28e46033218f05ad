"""``iteris methods``, ``explain``, ``store`` and ``demo``: about the program itself."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ..calibration import Calibration
from ..errors import KINDS, UsageError, meaning_of, remedy_of
from ..hosts.sample_store import SampleStore
from ..methods import all_methods, find_method
from ..settings import PRESETS, Setting, Settings, declared_settings
from .common import print_table, progress_bars, spelled
from .options import option

HEADINGS = ("setting", "default", "values", "what it is")


def methods(
    method: Annotated[str | None, typer.Argument(help="Show only this method, in full")] = None,
) -> None:
    """List the merge methods, presets and settings."""
    if method is not None:
        chosen = find_method(method)
        print_table(HEADINGS, setting_rows(chosen.settings), f"{method}: {chosen.summary}")
        return
    rows = [
        (m.name, m.summary, written(asdict(m.settings())), "yes" if m.needs_host else "no")
        for m in all_methods()
    ]
    print_table(("method", "what it does", "settings", "runs the base"), rows)
    print_table(HEADINGS, setting_rows(Calibration), "calibration, of all that run the base")
    print_table(("preset", "what it is"), [(name, preset.help) for name, preset in PRESETS.items()])


def setting_rows(owner: type[Settings]) -> list[tuple[str, ...]]:
    """A row below :data:`HEADINGS` for each setting."""
    return [
        (name, setting.shown(setting.default), setting.allowed(), setting.explained())
        for name, setting in declared_settings(owner).items()
    ]


def written(values: Mapping[str, Any]) -> str:
    """Settings as on the command line."""
    return ", ".join(f"{name}={Setting.shown(value)}" for name, value in values.items())


def explain(
    code: Annotated[
        str | None,
        typer.Argument(help="The code at the end of a message, such as IT-09; default: all"),
    ] = None,
) -> None:
    """Explain an error code and what to do about it.

    \b
    iteris explain IT-09
    """
    codes = {kind.code: kind for kind in KINDS}
    number = re.fullmatch(r"\[?(?:IT-?)?(\d+)\]?", (code or "").strip().upper())
    name = f"IT-{int(number[1]):02d}" if number is not None else code
    if name is None:
        typer.echo("\n".join(f"{name}  {meaning_of(kind)}" for name, kind in codes.items()))
    elif name not in codes:
        raise UsageError(f"There is no error {code!r}; the codes are {', '.join(codes)}.")
    else:
        remedy = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", spelled(remedy_of(codes[name])))
        typer.echo(f"{name}  {meaning_of(codes[name])}\n{remedy.replace('`', '')}")


def store(
    folder: Annotated[Path | None, typer.Argument(help="Default: the one in use")] = None,
    clear: Annotated[bool, option("Remove all samples", "--clear")] = False,
) -> None:
    """Show the size of the store of denoised samples, or clear it.

    \b
    iteris store --clear
    """
    kept = SampleStore.at(folder or SampleStore.default())
    if kept is None:
        raise UsageError("No samples are kept, because ITERIS_STORE is none; name a folder.")
    size = f"{(kept.clear() if clear else kept.size) / 2**30:.2f} GiB"
    typer.echo(f"Removed {size} from {kept.folder}." if clear else f"{kept.folder} holds {size}.")


def demo(
    output: Annotated[Path, option("Folder for images and scores", "--output", "-o")] = Path(
        "build/demo"
    ),
) -> None:
    """Merge two and four concepts of the bundled toybox, draw and score them."""
    try:
        toybox_demo: Any = importlib.import_module("toybox.demo")
    except ModuleNotFoundError as error:
        raise UsageError(
            "The toybox is not installed; run this from a checkout of the project."
        ) from error
    with progress_bars() as on_progress:
        table = toybox_demo.run(output, on_progress)
    Console().print(table)
