"""Messages, tables, progress bars and saving that commands share."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ..errors import IterisError, SaveError
from ..lora import Lora
from ..lora_files import Layout
from ..lora_files.experts import write_by_expert
from ..progress import OnProgress, Progress
from ..saving import rescued

console = Console(stderr=True, emoji=False)  # "sks:dog:" is no picture of a dog


def warn(text: str) -> None:
    """Print a warning to stderr."""
    console.print(text, style="yellow", markup=False, highlight=False)


def spelled(text: str) -> str:
    """``text`` with options as on this command line: option allow_partial is --allow-partial."""
    return re.sub(r"\boption ([a-z_]+)", lambda m: "--" + m[1].replace("_", "-"), text)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", caption: str = ""
) -> None:
    """Print a table to stdout, with or without ``headings``."""
    table = Table(
        *headings, title=title or None, caption=caption or None, show_header=bool(headings)
    )
    table.title_justify = table.caption_justify = "left"
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def progress_bars(*, visible: bool = True) -> Generator[OnProgress]:
    """A progress bar per kind of work, on stderr; the active one shows the total time left.
    Messages without a count, such as a plan, are lines above the bars."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}", justify="right"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", style="progress.remaining"),
    )
    announced, last = set[str](), ""
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=console, disable=not visible) as bars:

        def on_progress(progress: Progress) -> None:
            nonlocal last
            what = progress.what
            if not progress.total:
                if what not in announced and visible:
                    bars.console.print(what, style="dim", highlight=False)
                announced.add(what)
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, left="")
            if last and last != what:
                bars.update(tasks[last], left="")
                bars.stop_task(tasks[last])
            last = what
            left = "" if progress.done == progress.total else progress.time_left
            bars.update(tasks[what], completed=progress.done, total=progress.total, left=left)

        yield on_progress


def save_or_keep(
    lora: Lora, path: Path, layout: Layout | None, dtype: str, overwrite: bool
) -> list[Path]:
    """Write ``lora`` so that hours of merging are not lost; return the paths.

    Values that do not fit in ``dtype`` are written as float32. If ``path`` or ``layout`` cannot be
    written at all, the merge goes into the system's folder for temporary files, in the base's own
    layout as float32, and the error says where it is.
    """
    write = partial(write_by_expert, lora, overwrite=overwrite)
    try:
        return write(path, layout=layout, dtype=dtype)
    except IterisError as error:
        failed = error
    if dtype != "float32" and not isinstance(failed, SaveError):
        try:
            paths = write(path, layout=layout, dtype="float32")
        except IterisError as error:
            failed = error
        else:
            warn(f"Written as float32, not {dtype}: {failed}")
            return paths
    raise rescued(partial(write, dtype="float32"), path.name, failed) from failed
