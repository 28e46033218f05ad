"""``iteris compare``"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..concepts import Concept
from ..errors import UsageError
from ..lora_files import ReadOptions
from ..merge import settings_over
from ..methods import find_method
from ..presets import PresetName
from ..progress import OnProgress, Progress
from .base import best_device, check_base, load_base
from .checks import check_concepts, warnings_of
from .common import (
    CALIBRATION,
    PICTURES,
    BaseDtype,
    Device,
    Memory,
    Offload,
    bytes_of,
    console,
    option,
    progress_bars,
)
from .concept_options import parse_concept, read_concepts
from .options import (
    CONCEPT_HELP,
    PRESET_HELP,
    calibration_option,
    given,
    parse_by_method,
    read_lines,
    setting_names,
)
from .pictures import open_images
from .score import ClipName, ClipWeights, DinoName


def compare(
    base: Annotated[str, typer.Argument(help="A pipeline of diffusers, as for merge")],
    output: Annotated[Path, option("A folder for the results", "--output", "-o")],
    concept: Annotated[list[str], option(CONCEPT_HELP)],
    refs: Annotated[list[Path], option("A folder of pictures for each --concept")],
    methods: Annotated[
        str,
        option(
            "Names with commas between; base for no LoRA, alone for each LoRA by itself, of which "
            "the others have their share"
        ),
    ] = "base,sum,average,iteris",
    setting: Annotated[
        list[str] | None,
        option(
            "[METHOD.]NAME=VALUE, such as ties.density=0.3 or samples=25: of one method, of all "
            "that have it, or of the calibration",
            "--set",
            autocompletion=setting_names,
        ),
    ] = None,
    preset: Annotated[PresetName | None, option(PRESET_HELP)] = None,
    together: Annotated[
        int | None,
        option("Merge every so many of the concepts, and give means over these compositions"),
    ] = None,
    prompts: Annotated[
        str,
        option(
            "composition, objects, animals, or a text file of prompts with {each}, {all}, or {1}, "
            "{2} …, for the concepts. A concept's likeness is measured on the prompts that name it "
            "alone",
            panel=PICTURES,
        ),
    ] = "composition",
    images_per_prompt: Annotated[int, option("Seeds per prompt", panel=PICTURES)] = 4,
    steps: Annotated[int, option("Denoising steps of the pictures", panel=PICTURES)] = 25,
    guidance: Annotated[float, option("Guidance scale of the pictures", panel=PICTURES)] = 7.5,
    scheduler: Annotated[
        str | None,
        option(
            "Of the pictures: a class of diffusers, such as DDIM or EulerDiscrete", panel=PICTURES
        ),
    ] = None,
    size: Annotated[
        str | None,
        option("Of the pictures in pixels: 512, or 768x512 for width x height", panel=PICTURES),
    ] = None,
    templates: Annotated[
        Path | None,
        option("A text file of prompt templates, with {} for the concept", panel=CALIBRATION),
    ] = None,
    samples: Annotated[int | None, calibration_option("samples")] = None,
    latent_size: Annotated[int | None, calibration_option("latent_size")] = None,
    collapse_below: Annotated[
        float | None,
        option(
            "Adds the share of concepts and pictures whose image alignment is under this",
            panel=PICTURES,
        ),
    ] = None,
    clip: ClipName = "ViT-L-14",
    clip_weights: ClipWeights = None,
    dino: DinoName = None,
    device: Device = None,
    base_dtype: BaseDtype = None,
    offload: Offload = None,
    memory: Memory = None,
    seed: Annotated[int, option("Of calibration and pictures")] = 0,
    overwrite: Annotated[
        bool, option("Replace the results of another comparison", "--overwrite")
    ] = False,
) -> None:
    """Merge with several methods, draw the same prompts, score and show them side by side."""
    from ..hosts.diffusers import DiffusersHost
    from ..score import ClipScorer, DinoScorer
    from ..score.compare import (
        ALONE,
        BASE,
        Comparison,
        check_together,
        compare_compositions,
        compare_methods,
    )
    from ..score.drawing import Drawing, find_scheduler
    from ..score.judged import PROMPT_LISTS, fill_prompts
    from ..score.results import check_results_folder, mean_rows, write_results
    from ..score.statistics import markdown_table

    names = [name.strip() for name in methods.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods has no name; give some, such as base,alone,average,iteris.")
    kinds = {name: find_method(name).settings for name in names if name not in (BASE, ALONE)}
    settings, calibration = parse_by_method(kinds, setting or [])
    lines = read_lines(templates) if templates else None
    calibration |= given(samples=samples, latent_size=latent_size, templates=lines)
    calibration = {"seed": seed, **calibration}
    for name in kinds:
        settings_over(preset or "default", name, settings[name], calibration)
    options = [parse_concept(text) for text in concept]
    if len(refs) != len(options):
        raise UsageError(
            f"Give --refs once for each --concept, in the same order: there are {len(refs)} for "
            f"{len(options)}."
        )
    drawing = Drawing(
        images_per_prompt, steps, guidance, seed, scheduler=scheduler, size=_size(size)
    )
    check_concepts(options, run_base=True)
    for line in warnings_of(options):
        console.print(escape(line), style="yellow", highlight=False)
    check_results_folder(output, overwrite=overwrite)
    references = [open_images(folder)[1] for folder in refs]
    wanted = PROMPT_LISTS.get(prompts) or read_lines(Path(prompts))
    fill_prompts(wanted, [Concept(None, trigger=one.trigger or "x") for one in options])
    check_together(together, len(options))
    if scheduler is not None:
        find_scheduler(scheduler)
    check_base(base)
    device = device or best_device()
    done: list[Comparison] = []
    with progress_bars() as on_progress, _said_where_it_stopped(output, done):
        pipeline = load_base(base, device, dtype=base_dtype, offload=offload)
        host = DiffusersHost(pipeline)
        concepts = read_concepts(options, host, ReadOptions())
        scorer = ClipScorer.load(clip, clip_weights, device=device)
        other = DinoScorer.load(dino, device=device) if dino else None

        def one(some: Sequence[Concept], pictures: Sequence[Any], name: str) -> Comparison:
            several = len(some) < len(concepts)
            before = list(done)

            def keep(comparison: Comparison) -> None:
                done[:] = [*before, comparison]
                write_results(done, output)

            return compare_methods(
                pipeline,
                host,
                some,
                pictures,
                names,
                scorer,
                templates=wanted,
                drawing=drawing,
                calibration=calibration,
                settings=settings,
                preset=preset or "default",
                memory_budget=bytes_of(memory),
                dino=other,
                collapse_below=collapse_below,
                on_progress=partial(_named, on_progress, name) if several else on_progress,
                on_row=keep,
            )

        comparisons = compare_compositions(concepts, references, together, one)
    written = write_results(comparisons, output)
    typer.echo(markdown_table(mean_rows(comparisons)))
    typer.echo(f"Wrote {', '.join(path.name for path in written)} into {output}.")


@contextmanager
def _said_where_it_stopped(output: Path, done: Sequence[Any]) -> Generator[None]:
    """Whatever stops the comparison, say that the finished rows are kept in ``output``."""
    try:
        yield
    except BaseException:
        if done:
            rows = ", ".join(done[-1].rows)
            console.print(f"Stopped early; {output} has what was finished: {rows}.", style="yellow")
        raise


def _named(on_progress: OnProgress, name: str, progress: Progress) -> None:
    on_progress(replace(progress, what=f"{name}: {progress.what}"))


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if found is None or "0" in found.groups():
        raise UsageError(f"--size {text!r} is not a number of pixels, or WIDTHxHEIGHT: 768x512.")
    width, height = int(found[1]), int(found[2] or found[1])
    if width % 8 or height % 8:
        nearest = "x".join(str(max(8, round(side / 8) * 8)) for side in (width, height))
        raise UsageError(f"--size {text!r}: both sides must be multiples of 8, such as {nearest}.")
    return width, height
