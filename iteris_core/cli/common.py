"""Options, tables and progress of all commands, and the run of a merge."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ..activations.processes import ALONE, Processes
from ..concepts import Concept
from ..hosts.protocol import Host
from ..merge import MergeResult, Runtime, merge_loras
from ..preview import Preview, preview_merge
from ..progress import OnProgress, Progress
from .base import device_of

console = Console(stderr=True)


def option(help: str, *names: str, panel: str | None = None, **limits: Any) -> Any:
    """A typer option, whose ``names`` come from its parameter where none are given; ``panel`` is
    under which heading the help has it."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **limits)


BASE, CALIBRATION, READING = "Base", "Calibration: on what features are collected", "LoRA files"
RESULT, TEXT_MODELS, PICTURES = "Result", "Models of transformers", "Pictures"
METHOD, AGAIN = "Method and settings", "Again, from a file"
"""Headings of the help."""

Device = Annotated[str | None, option("cpu, cuda, …; the best by default", panel=BASE)]
BaseDtype = Annotated[
    Literal["float16", "bfloat16", "float32"] | None,
    option("Of the base; on a GPU bfloat16, or float16 for a UNet, else float32", panel=BASE),
]
Offload = Annotated[
    Literal["model", "sequential"] | None,
    option(
        "Keep the base in host memory: the model that runs, or only its layer, is on the GPU",
        panel=BASE,
    ),
]
Memory = Annotated[
    float | None,
    option("GiB a merge may take beyond the model; what is free by default", panel=BASE, min=0),
]


def bytes_of(memory: float | None) -> int | Literal["free"]:
    return "free" if memory is None else round(memory * 2**30)


def print_table(
    headings: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", caption: str = ""
) -> None:
    """Print a table to stdout; without ``headings`` it has none."""
    table = Table(*headings, title=title or None, caption=caption or None)
    table.title_justify = table.caption_justify = "left"
    table.show_header = bool(headings)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


@contextmanager
def progress_bars(*, visible: bool = True) -> Generator[OnProgress]:
    """A progress bar per thing to do, on stderr, with the time that all of it has left at the one
    that is being done. What has no count, such as a plan, is a line above them."""
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


@contextmanager
def processes(device: str | None) -> Generator[tuple[Processes, str]]:
    """This process's part in one merge over those that ``accelerate launch`` or ``torchrun`` have
    started, and its device."""
    device = device_of(device)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE, device
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    rank_device = torch.device("cpu" if state.device is None else state.device)
    try:
        yield Processes(state.process_index, state.num_processes, rank_device), str(rank_device)
    finally:
        state.destroy_process_group()


Load = Callable[[str], tuple[Host, Sequence[Concept]]]
"""The base on a device, and the concepts with their LoRAs."""


def run_merge(
    device: str | None, load: Load, options: Mapping[str, Any], *, quiet: bool = False
) -> MergeResult | None:
    """Merge what ``load(device)`` gives, with :func:`..merge.merge_loras`'s ``options``. Of several
    processes the first is to write the result; the others get None."""
    with (
        processes(device) as (group, own_device),
        progress_bars(visible=group.rank == 0 and not quiet) as on_progress,
    ):
        loaded, runtime = _loaded(load, own_device, on_progress), Runtime(processes=group)
        result = merge_loras(*loaded, on_progress=on_progress, runtime=runtime, **options)
        group.wait()
    return None if group.rank else result


def foresee(
    device: str | None, load: Load, options: Mapping[str, Any], *, quiet: bool = False
) -> Preview:
    """Preview such a merge; nothing is merged."""
    with progress_bars(visible=not quiet) as on_progress:
        loaded = _loaded(load, device_of(device), on_progress)
        return preview_merge(*loaded, on_progress=on_progress, **options)


def _loaded(load: Load, device: str, on_progress: OnProgress) -> tuple[Host, Sequence[Concept]]:
    on_progress(Progress("loading the base", 0, 1))
    base_and_concepts = load(device)
    on_progress(Progress("loading the base", 1, 1))
    return base_and_concepts
