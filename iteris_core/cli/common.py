"""What the commands share: options, the base, progress, and the run of a merge."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ..activations.meter import is_out_of_memory
from ..activations.processes import ALONE, Processes
from ..concepts import Concept
from ..errors import IterisError, OutOfMemory, brief
from ..hosts.protocol import Host
from ..lora_files import check_file
from ..merge import MergeResult, merge_loras
from ..preview import Preview, preview_merge
from ..progress import OnProgress, Progress

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


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raise :class:`IterisError` for a device that is not here, before anything is loaded."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise IterisError(
            f"--device {device!r} is no device of torch; say cpu, cuda, cuda:1, …"
        ) from error
    backend = getattr(torch, kind, None)
    available = getattr(backend, "is_available", None)
    if kind == "mps":
        available = torch.backends.mps.is_available
    if available is not None and not available():
        raise IterisError(
            f"--device {device}: torch {torch.__version__} finds no {kind} device here. Leave "
            "--device out for the best that there is, or say cpu; iteris doctor shows what is here."
        )


def check_base(base: str) -> None:
    """Raise :class:`IterisError` for a local base of diffusers that cannot be one."""
    path = Path(base)
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise IterisError(
            f"The base {base!r} cannot be loaded: the folder has no model_index.json. Give a "
            "folder with a pipeline of diffusers, a .safetensors checkpoint or a hub name."
        )
    if path.is_file() and path.suffix == ".safetensors":
        check_file(path)
    if not path.exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
        raise IterisError(
            f"The base {base!r} does not exist: there is no such folder or file, and a name on the "
            "hub is OWNER/NAME."
        )


def load_base(
    base: str,
    device: str | None,
    config: Path | None = None,
    dtype: str | None = None,
    offload: str | None = None,
) -> Any:
    """The pipeline in a folder or of a hub name, or of a single file by what is in it.

    ``config`` is a folder with the pipeline's configuration (``model_index.json`` and one folder a
    part) for a single file; without it diffusers takes that of the released model from the hub.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from ..hosts.diffusers_lora import single_file_pipeline

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    device = device or best_device()
    check_device(device)
    check_base(base)
    with loading(base, "pipeline of diffusers, a .safetensors checkpoint"):
        if base.endswith(".safetensors"):
            of_file = single_file_pipeline(Path(base), config) if Path(base).is_file() else None
            where = {} if config is None else {"config": str(config)}
            pipeline = (of_file or StableDiffusionPipeline).from_single_file(base, **where)
        else:
            pipeline = DiffusionPipeline.from_pretrained(base, use_safetensors=True)
        if dtype is None and device == "cpu":
            dtype = "float32"
        half = "float16" if hasattr(pipeline, "unet") else "bfloat16"
        pipeline.to(dtype=getattr(torch, dtype or half))
        if offload == "model":
            pipeline.enable_model_cpu_offload(device=device)
        elif offload == "sequential":
            pipeline.enable_sequential_cpu_offload(device=device)
        else:
            pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextmanager
def loading(base: str, what: str) -> Generator[None]:
    """What a library raises becomes an :class:`IterisError` that asks for a folder with ``what``
    or a hub name."""
    try:
        yield
    except IterisError:
        raise
    except Exception as error:  # the libraries raise many kinds; the message is what helps
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"Memory ran out while the base {base!r} was loaded ({brief(error)}); try "
                "--offload model, --base-dtype bfloat16, or a device with more memory."
            ) from error
        here = "" if Path(base).exists() else " There is no folder or file of that name here."
        raise IterisError(
            f"The base {base!r} cannot be loaded ({brief(error)}).{here} Give a folder with a "
            f"{what} or a hub name."
        ) from error


@contextmanager
def progress_bars(*, shown: bool = True) -> Generator[OnProgress]:
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
    with Bars(*columns, console=console, disable=not shown) as bars:

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
    device = device or best_device()
    check_device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield ALONE, device
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu")
    own = torch.device("cpu" if state.device is None else state.device)
    try:
        yield Processes(state.process_index, state.num_processes, own), str(own)
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
        progress_bars(shown=group.rank == 0 and not quiet) as on_progress,
    ):
        host, concepts = _loaded(load, own_device, on_progress)
        result = merge_loras(host, concepts, on_progress=on_progress, processes=group, **options)
        group.wait()
    return None if group.rank else result


def foresee(
    device: str | None, load: Load, options: Mapping[str, Any], *, quiet: bool = False
) -> Preview:
    """What such a merge would do; nothing is merged."""
    options = {name: value for name, value in options.items() if name != "unmergeable"}
    with progress_bars(shown=not quiet) as on_progress:
        host, concepts = _loaded(load, device or best_device(), on_progress)
        return preview_merge(host, concepts, on_progress=on_progress, **options)


def _loaded(load: Load, device: str, on_progress: OnProgress) -> tuple[Host, Sequence[Concept]]:
    check_device(device)
    on_progress(Progress("loading the base", 0, 1))
    found = load(device)
    on_progress(Progress("loading the base", 1, 1))
    return found
