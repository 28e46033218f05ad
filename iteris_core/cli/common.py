"""Messages, tables and progress bars that commands share."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from ..errors import with_options
from ..progress import OnProgress, Progress

_ARGUMENTS = {"base": "--base; for merge, BASE"}
"""Options that a command has as an argument."""
console = Console(stderr=True, emoji=False)  # "sks:dog:" is no picture of a dog


def warn(text: str) -> None:
    """Print a warning to stderr."""
    console.print(text, style="yellow", markup=False, highlight=False)


def spelled(text: str) -> str:
    """``text`` with options as on this command line: option allow_partial is --allow-partial."""
    return with_options(text, lambda name: _ARGUMENTS.get(name, "--" + name.replace("_", "-")))


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", caption: str = ""
) -> None:
    """Print a table to stdout, with or without ``headings``. Texts of files are no markup."""
    table = Table(show_header=bool(headings))
    for heading in headings:
        table.add_column(Text(heading))
    table.title = Text(title, "table.title") if title else None
    table.caption = Text(caption, "table.caption") if caption else None
    table.title_justify = table.caption_justify = "left"
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


@contextmanager
def progress_bars(*, visible: bool = True) -> Generator[OnProgress]:
    """A progress bar per kind of work, on stderr; the active one shows the total time left.
    Messages without a count, such as a plan, are lines above the bars."""
    columns = (
        TextColumn("{task.description}", markup=False),
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
                    bars.console.print(what, style="dim", markup=False, highlight=False)
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
