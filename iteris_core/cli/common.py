"""Options, tables and progress bars that all commands share, and the run of a merge."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ..concepts import Concept
from ..hosts.protocol import Host
from ..merge import MergeResult, merge_loras
from ..preview import Preview, preview_merge
from ..progress import OnProgress, Progress
from .base import device_of

console = Console(stderr=True, emoji=False)  # "sks:dog:" is no picture of a dog


def option(help: str, *names: str, panel: str | None = None, **limits: Any) -> Any:
    """A typer option. Its ``names`` default to the parameter's; ``panel`` is its heading in the
    help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **limits)


def spelled(text: str) -> str:
    """``text`` of the core with its options as on this command line: "option allow_partial" is
    --allow-partial."""
    return re.sub(r"\boption ([a-z_]+)", lambda m: "--" + m[1].replace("_", "-"), text)


BASE, CALIBRATION, READING = "Base", "Calibration: prompts and latents", "LoRA files"
RESULT, TEXT_MODELS, PICTURES = "Result", "Transformers models", "Pictures"
METHOD, AGAIN = "Method and settings", "Repeat a merge, or use a merge file"
"""Headings of the help."""

Device = Annotated[str | None, option("cpu, cuda, …; default: the best available", panel=BASE)]
BaseDtype = Annotated[
    Literal["float16", "bfloat16", "float32"] | None,
    option(
        "Type of the base; on a GPU bfloat16, or float16 for a UNet, otherwise float32", panel=BASE
    ),
]
Offload = Annotated[
    Literal["model", "sequential"] | None,
    option(
        "Keep the base in host memory; only the running model, or only its running layer, is on "
        "the GPU",
        panel=BASE,
    ),
]
Memory = Annotated[
    float | None,
    option("GiB a merge may use beyond the model; default: all free memory", panel=BASE, min=0),
]


def bytes_of(memory: float | None) -> int | Literal["free"]:
    return "free" if memory is None else round(memory * 2**30)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", caption: str = ""
) -> None:
    """Print a table to stdout, with or without ``headings``."""
    table = Table(*headings, title=title or None, caption=caption or None)
    table.title_justify = table.caption_justify = "left"
    table.show_header = bool(headings)
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
        TextColumn("{task.fields[count]}", justify="right"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", style="progress.remaining"),
    )
    tasks: dict[str, Any] = {}
    last = ""
    with Bars(*columns, console=console, disable=not visible) as bars:

        def on_progress(progress: Progress) -> None:
            nonlocal last
            what = progress.what
            if not progress.total:
                if what not in tasks:
                    tasks[what] = None
                    if visible:
                        bars.console.print(what, style="dim", highlight=False)
                return
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=progress.total, count="", left="")
            if last and last != what:
                bars.update(tasks[last], left="")
                bars.stop_task(tasks[last])
            last = what
            bars.update(
                tasks[what],
                completed=progress.done,
                total=progress.total,
                count=f"{progress.done}/{progress.total}",
                left="" if progress.done == progress.total else progress.time_left,
            )

        yield on_progress


Loaded = tuple[Host | None, Sequence[Concept]]
Load = Callable[[str], Loaded]
"""The base on a device (None: not needed), and the concepts with their LoRAs."""


def run_merge(
    device: str | None, load: Load, options: Mapping[str, Any], *, quiet: bool = False
) -> MergeResult:
    """Merge what ``load(device)`` returns, with :func:`..merge.merge_loras`'s ``options``."""
    chosen = device_of(device)
    with progress_bars(visible=not quiet) as on_progress:
        loaded = _loaded(load, chosen, on_progress)
        return merge_loras(*loaded, on_progress=on_progress, **options)


def foresee(
    device: str | None, load: Load, options: Mapping[str, Any], *, quiet: bool = False
) -> Preview:
    """Preview this merge; nothing is merged. The caller prints the plan."""
    chosen = device_of(device)
    with progress_bars(visible=not quiet) as show:

        def on_progress(progress: Progress) -> None:
            if not progress.plan:
                show(progress)

        loaded = _loaded(load, chosen, on_progress)
        return preview_merge(*loaded, on_progress=on_progress, **options)


def _loaded(load: Load, device: str, on_progress: OnProgress) -> Loaded:
    on_progress(Progress("loading the base", 0, 1))
    base_and_concepts = load(device)
    on_progress(Progress("loading the base", 1, 1))
    return base_and_concepts
