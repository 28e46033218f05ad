"""``iteris compare``"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..concept_config import ConceptConfig
from ..concepts import Concept
from ..errors import UsageError
from ..lora_files import ReadOptions
from ..merge import settings_over
from ..methods import find_method
from ..presets import PresetName
from ..progress import OnProgress, Progress
from ..score.compare import (
    ALONE,
    BASE,
    CompareConfig,
    Comparison,
    check_together,
    compare_compositions,
    compare_methods,
)
from ..score.drawing import Drawing, find_scheduler
from ..score.judged import PROMPT_LISTS, fill_prompts
from ..score.results import check_results_folder, mean_rows, write_results
from ..score.statistics import markdown_table
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
    progress_bars,
)
from .concept_options import parse_concept, read_concepts
from .options import (
    CONCEPT_HELP,
    PRESET_HELP,
    calibration_option,
    command,
    given,
    given_by,
    parse_by_method,
    read_lines,
    setting_names,
)
from .pictures import open_images
from .score import ClipName, ClipWeights, DinoName


@dataclass(frozen=True)
class CompareOptions:
    """A field for each option, named like it."""

    base: Annotated[str, typer.Argument(help="A pipeline of diffusers, as for merge")]
    output: Path = given_by("A folder for the results", "--output", "-o", default=MISSING)
    concept: list[str] = given_by(CONCEPT_HELP, default=MISSING)
    refs: list[Path] = given_by("A folder of pictures for each --concept", default=MISSING)
    methods: str = given_by(
        "Names with commas between; base for no LoRA, alone for each LoRA by itself, of which "
        "the others have their share",
        default="base,sum,average,iteris",
    )
    setting: list[str] | None = given_by(
        "[METHOD.]NAME=VALUE, such as ties.density=0.3 or samples=25: of one method, of all "
        "that have it, or of the calibration",
        "--set",
        autocompletion=setting_names,
    )
    preset: PresetName | None = given_by(PRESET_HELP)
    together: int | None = given_by(
        "Merge every so many of the concepts, and give means over these compositions"
    )
    prompts: str = given_by(
        "composition, objects, animals, or a text file of prompts with {each}, {all}, or {1}, "
        "{2} …, for the concepts. A concept's likeness is measured on the prompts that name it "
        "alone",
        panel=PICTURES,
        default="composition",
    )
    images_per_prompt: int = given_by("Seeds per prompt", panel=PICTURES, default=4)
    steps: int = given_by("Denoising steps of the pictures", panel=PICTURES, default=25)
    guidance: float = given_by("Guidance scale of the pictures", panel=PICTURES, default=7.5)
    scheduler: str | None = given_by(
        "Of the pictures: a class of diffusers, such as DDIM or EulerDiscrete", panel=PICTURES
    )
    size: str | None = given_by(
        "Of the pictures in pixels: 512, or 768x512 for width x height", panel=PICTURES
    )
    templates: Path | None = given_by(
        "A text file of prompt templates, with {} for the concept", panel=CALIBRATION
    )
    samples: Annotated[int | None, calibration_option("samples")] = None
    latent_size: Annotated[int | None, calibration_option("latent_size")] = None
    collapse_below: float | None = given_by(
        "Adds the share of concepts and pictures whose image alignment is under this",
        panel=PICTURES,
    )
    clip: ClipName = "ViT-L-14"
    clip_weights: ClipWeights = None
    dino: DinoName = None
    device: Device = None
    base_dtype: BaseDtype = None
    offload: Offload = None
    memory: Memory = None
    seed: int = given_by("Of calibration and pictures", default=0)
    overwrite: bool = given_by(
        "Replace the results of another comparison", "--overwrite", default=False
    )


@command(CompareOptions)
def compare(context: typer.Context, options: CompareOptions) -> None:
    """Merge with several methods, draw the same prompts, score and show them side by side."""
    from ..hosts.diffusers import DiffusersHost
    from ..score import ClipScorer, DinoScorer

    config, listed, references = _checked(options)
    device = options.device or best_device()
    done: list[Comparison] = []
    with progress_bars() as on_progress, _said_where_it_stopped(options.output, done):
        pipeline = load_base(
            options.base, device, dtype=options.base_dtype, offload=options.offload
        )
        host = DiffusersHost(pipeline)
        concepts = read_concepts(listed, host, ReadOptions())
        scorer = ClipScorer.load(options.clip, options.clip_weights, device=device)
        other = DinoScorer.load(options.dino, device=device) if options.dino else None

        def one(some: Sequence[Concept], pictures: Sequence[Any], name: str) -> Comparison:
            several = len(some) < len(concepts)
            before = list(done)

            def keep(comparison: Comparison) -> None:
                done[:] = [*before, comparison]
                write_results(done, options.output)

            return compare_methods(
                pipeline,
                host,
                some,
                pictures,
                config,
                scorer,
                dino=other,
                on_progress=partial(_named, on_progress, name) if several else on_progress,
                on_row=keep,
            )

        together = options.together
        comparisons = compare_compositions(concepts, references, together, one)
    written = write_results(comparisons, options.output)
    typer.echo(markdown_table(mean_rows(comparisons)))
    typer.echo(f"Wrote {', '.join(path.name for path in written)} into {options.output}.")


def _checked(
    options: CompareOptions,
) -> tuple[CompareConfig, list[ConceptConfig], list[list[Any]]]:
    """What is compared, of which concepts, with which pictures. Raises :class:`IterisError` for
    what is wrong, before a base is loaded."""
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods has no name; give some, such as base,alone,average,iteris.")
    kinds = {name: find_method(name).settings for name in names if name not in (BASE, ALONE)}
    settings, calibration = parse_by_method(kinds, options.setting or [])
    lines = read_lines(options.templates) if options.templates else None
    more = given(samples=options.samples, latent_size=options.latent_size, templates=lines)
    calibration = {"seed": options.seed, **calibration, **more}
    for name in kinds:
        settings_over(options.preset or "default", name, settings[name], calibration)
    concepts = [parse_concept(text) for text in options.concept]
    compared = [concept for concept in concepts if concept.always_on == "no"]
    if len(options.refs) != len(compared):
        raise UsageError(
            "Give --refs once for each --concept, in the same order: there are "
            f"{len(options.refs)} for {len(compared)}."
        )
    drawing = Drawing(
        options.images_per_prompt,
        options.steps,
        options.guidance,
        options.seed,
        scheduler=options.scheduler,
        size=_size(options.size),
    )
    check_concepts(concepts, run_base=True)
    for line in warnings_of(concepts):
        console.print(escape(line), style="yellow", highlight=False)
    check_results_folder(options.output, overwrite=options.overwrite)
    references = [open_images(folder)[1] for folder in options.refs]
    wanted = PROMPT_LISTS.get(options.prompts) or read_lines(Path(options.prompts))
    fill_prompts(wanted, [Concept(None, trigger=one.trigger or "x") for one in compared])
    check_together(options.together, len(compared))
    if options.scheduler is not None:
        find_scheduler(options.scheduler)
    check_base(options.base)
    preset, memory = options.preset or "default", bytes_of(options.memory)
    config = CompareConfig(
        names, wanted, drawing, settings, calibration, preset, memory, options.collapse_below
    )
    return config, concepts, references


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
