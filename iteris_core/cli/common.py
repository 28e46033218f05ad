"""What the commands share: the base, progress."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from ..errors import IterisError, brief

console = Console(stderr=True)


def best_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_base(base: str, device: str | None, config: Path | None = None) -> Any:
    """The pipeline in a folder or of a hub name, or of a single file by what is in it.

    ``config`` is a folder with the pipeline's configuration (``model_index.json`` and one folder a
    part) for a single file; without it diffusers takes that of the released model from the hub.
    """
    import torch
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )
    from diffusers.utils import logging as diffusers_logging

    from ..hosts.diffusers_lora import single_file_pipeline

    diffusers_logging.set_verbosity_error()
    device = device or best_device()
    try:
        if base.endswith(".safetensors"):
            of_file = single_file_pipeline(Path(base)) if Path(base).is_file() else None
            where = {} if config is None else {"config": str(config)}
            pipeline = (of_file or StableDiffusionPipeline).from_single_file(base, **where)
        else:
            pipeline = DiffusionPipeline.from_pretrained(base, use_safetensors=True)
    except IterisError:
        raise
    except Exception as error:  # the libraries raise many kinds; the message is what helps
        raise IterisError(
            f"The base {base!r} cannot be loaded ({brief(error)}); give a folder with a "
            "Stable Diffusion pipeline of diffusers, a .safetensors checkpoint or a hub name."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.float16 if device.startswith("cuda") else torch.float32)


@contextmanager
def progress_bars(*, shown: bool = True) -> Generator[Callable[[str, int, int], None]]:
    """A progress bar per thing to do, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars: dict[str, TaskID] = {}
    shown_on = Progress(*columns, TimeElapsedColumn(), console=console, disable=not shown)
    with shown_on as progress:

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield on_progress
