"""The command line: ``iteris merge`` and ``iteris demo``."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from .calibration import TEMPLATES, Calibration, Concept
from .errors import IterisError
from .lora_files import check_target
from .merge import MergeResult, merge_loras
from .methods import all_methods, find_method

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)


@app.callback()
def _root() -> None:
    """Merge several LoRAs into one by least squares on what the merged model really sees."""


@dataclass(frozen=True)
class _ConceptOption:
    file: Path
    trigger: str
    class_word: str
    strength: float


def _parse_concept(text: str) -> _ConceptOption:
    parts = text.rsplit(":", 3)
    strength = 1.0
    if len(parts) == 4:
        try:
            strength = float(parts[3])
        except ValueError:  # a colon in the path, as in C:\loras\cat.safetensors:sks:cat
            parts = [f"{parts[0]}:{parts[1]}", *parts[2:]]
    if len(parts) < 3:
        raise IterisError(
            f"--concept {text!r} is not FILE:TRIGGER:CLASS or FILE:TRIGGER:CLASS:STRENGTH, "
            "such as cat.safetensors:sks:cat"
        )
    return _ConceptOption(Path(parts[0]), parts[1], parts[2], strength)


@app.command()
def merge(
    base: Annotated[
        str, typer.Argument(help="Stable Diffusion: a diffusers folder, a .safetensors, a hub name")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors to write")],
    concept: Annotated[
        list[str], typer.Option(help="FILE:TRIGGER:CLASS[:STRENGTH]; give it once per LoRA")
    ],
    method: Annotated[str, typer.Option(help=", ".join(m.name for m in all_methods()))] = "iteris",
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="NAME=VALUE of the method, such as align=adapter, rank=16"),
    ] = None,
    preserve: Annotated[
        Path | None, typer.Option(help="A text file of prompts on which the base is to stay")
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="A text file of prompt templates, with {} for the concept")
    ] = None,
    samples: Annotated[int, typer.Option(help="Prompts per concept")] = 50,
    timesteps: Annotated[int, typer.Option(help="Latents per prompt")] = 4,
    latents: Annotated[str, typer.Option(help="denoising or noise (quick)")] = "denoising",
    latent_size: Annotated[int | None, typer.Option(help="Side of the latents")] = None,
    seed: Annotated[int, typer.Option(help="Decides prompts and latents")] = 0,
    layout: Annotated[str, typer.Option(help="kohya (read everywhere) or peft")] = "kohya",
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32 of the file")] = (
        "float16"
    ),
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; the best by default")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output file")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
) -> None:
    """Merge LoRAs on a Stable Diffusion base and write one LoRA."""
    chosen = find_method(method)
    calibration = Calibration(
        samples=samples,
        timesteps=timesteps,
        latents=latents,  # type: ignore[arg-type]
        latent_size=latent_size,
        seed=seed,
        templates=_lines(templates) if templates else TEMPLATES,
    )
    settings = chosen.settings(**_parse_settings(chosen.settings, setting or []))
    options = [_parse_concept(text) for text in concept]
    check_target(output, layout, dtype, overwrite)

    from .hosts.diffusers import DiffusersHost

    with _progress() as on_progress:
        on_progress("loading the base", 0, 1)
        host = DiffusersHost(_load_base(base, device))
        on_progress("loading the base", 1, 1)
        concepts = [
            Concept(
                host.read_lora(option.file),
                trigger=option.trigger,
                class_word=option.class_word,
                strength=option.strength,
            )
            for option in options
        ]
        if preserve is not None:
            concepts.append(Concept(None, prompts=_lines(preserve), trigger="preserve"))
        result = merge_loras(
            host,
            concepts,
            method,
            settings=settings,
            calibration=calibration,
            on_progress=on_progress,
        )
    path = result.save(output, layout=layout, dtype=dtype, overwrite=overwrite)  # type: ignore[arg-type]
    _report(result, path, as_json)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where pictures and scores go")] = Path("build/demo"),
) -> None:
    """Merge two and four concepts of the embedded toybox, draw and score them."""
    try:
        toybox_demo: Any = importlib.import_module("toybox.demo")
    except ModuleNotFoundError as error:
        raise IterisError(
            "The toybox is not installed; run this from a checkout of the project."
        ) from error
    with _progress() as on_progress:
        table = toybox_demo.run(output, on_progress)
    Console().print(table)


def _report(result: MergeResult, path: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"path": str(path), **result.report.to_dict()}))
    else:
        typer.echo(result.report.summary())
        typer.echo(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")


def _parse_settings(kind: type, pairs: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    names = list(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in names:
            raise IterisError(f"--set {pair!r}: write NAME=VALUE; names are {', '.join(names)}.")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise IterisError(f"{path} does not exist or is not a file.")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def _load_base(base: str, device: str | None) -> Any:
    import torch
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
        StableDiffusionPipeline,
    )

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if base.endswith(".safetensors"):
            pipeline = StableDiffusionPipeline.from_single_file(base)
        else:
            pipeline = StableDiffusionPipeline.from_pretrained(base, use_safetensors=True)
    except Exception as error:  # the libraries raise many kinds; the message is what helps
        raise IterisError(
            f"The base {base!r} cannot be loaded ({str(error)[:300]}); give a folder with a "
            "Stable Diffusion pipeline of diffusers, a .safetensors checkpoint or a hub name."
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device, torch.float16 if device.startswith("cuda") else torch.float32)


@contextmanager
def _progress() -> Generator[Callable[[str, int, int], None]]:
    """A progress bar per thing to do, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bars: dict[str, TaskID] = {}
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:

        def on_progress(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield on_progress


def main() -> None:
    """Run the command line; an :class:`IterisError` is one line and exit status 2."""
    logging.basicConfig(level=logging.WARNING)
    try:
        app()
    except IterisError as error:
        console.print(f"[bold red]iteris:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
