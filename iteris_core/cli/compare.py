"""``iteris compare``"""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..concepts import Calibration
from ..config import ConceptConfig
from ..errors import UsageError
from ..methods import find_method
from ..methods.registry import settings_over
from ..presets import PresetName
from ..reading import read_concept
from ..score.compare import (
    CompareConfig,
    Comparison,
    compare_methods,
    compositions,
    own_references,
)
from ..score.drawing import Drawing, find_scheduler
from ..score.judged import PROMPT_LISTS, fill_prompts
from ..score.results import check_results_folder, mean_rows, write_results
from ..score.row_scores import ALONE, BASE
from ..score.statistics import markdown_table
from .base import check_base, device_of, load_base
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
from .concept_options import parse_concept
from .options import (
    CONCEPT_HELP,
    PRESET_HELP,
    command,
    given,
    given_by,
    parse_by_method,
    read_lines,
    setting_names,
    settings_of,
)
from .pictures import open_images
from .score import ClipName, ClipWeights, DinoName


@dataclass(frozen=True)
class CompareOptions:
    """One field per option, with the option's name."""

    base: Annotated[str, typer.Argument(help="A diffusers pipeline, as for merge")]
    output: Path = given_by("A folder for the results", "--output", "-o", default=MISSING)
    concept: list[str] = given_by(CONCEPT_HELP, default=MISSING)
    refs: list[Path] | None = given_by(
        "A folder of reference images for each --concept; default: images by each LoRA alone"
    )
    methods: str = given_by(
        "Comma-separated names. base: no LoRA. alone: each LoRA by itself; the other rows then "
        "show their share of it",
        default="base,sum,average,iteris",
    )
    setting: list[str] | None = given_by(
        "[METHOD.]NAME=VALUE, such as ties.density=0.3 or samples=25: for one method, for every "
        "method with that setting, or for the calibration",
        "--set",
        autocompletion=setting_names,
    )
    preset: PresetName | None = given_by(PRESET_HELP)
    together: int | None = given_by(
        "Merge every combination of N concepts, and give means over these"
    )
    prompts: str = given_by(
        "composition, objects, animals, or a text file of prompts with {each}, {all}, or {1}, "
        "{2} …, for the concepts. A concept's likeness is measured on prompts that name only that "
        "concept",
        panel=PICTURES,
        default="composition",
    )
    drawing: Mapping[str, Any] = settings_of(Drawing, PICTURES)
    scheduler: str | None = given_by(
        "Scheduler for the images: a diffusers class, such as DDIM or EulerDiscrete", panel=PICTURES
    )
    size: str | None = given_by(
        "Image size in pixels: 512, or 768x512 for width x height", panel=PICTURES
    )
    templates: Path | None = given_by(
        "A text file of prompt templates, with {} for the concept", panel=CALIBRATION
    )
    calibration: Mapping[str, Any] = settings_of(Calibration, CALIBRATION, "samples", "latent_size")
    collapse_below: float | None = given_by(
        "Also report the share of concepts and images whose image alignment is below this",
        panel=PICTURES,
    )
    clip: ClipName = "ViT-L-14"
    clip_weights: ClipWeights = None
    dino: DinoName = None
    device: Device = None
    base_dtype: BaseDtype = None
    offload: Offload = None
    memory: Memory = None
    overwrite: bool = given_by(
        "Replace the results of another comparison", "--overwrite", default=False
    )


@command(CompareOptions)
def compare(context: typer.Context, options: CompareOptions) -> None:
    """Merge with several methods, draw the same prompts with each, and score the results side by
    side.

    \b
    iteris compare BASE -o results --methods base,alone,average,iteris \\
      --concept cat.safetensors:sks:cat --refs pictures/cat \\
      --concept dog.safetensors:zwx:dog --refs pictures/dog
    """
    from ..hosts.diffusers import DiffusersHost
    from ..score import ClipScorer, DinoScorer

    config, listed, references = _checked(options)
    device = device_of(options.device)
    done: list[Comparison] = []
    with progress_bars() as on_progress, _said_where_it_stopped(options.output, done):
        pipeline = load_base(
            options.base, device, dtype=options.base_dtype, offload=options.offload
        )
        host = DiffusersHost(pipeline)
        concepts = [read_concept(one, host) for one in listed]
        if options.refs is None:
            references = own_references(pipeline, host, concepts, config.drawing, on_progress)
        scorer = ClipScorer.load(options.clip, options.clip_weights, device=device)
        other = DinoScorer.load(options.dino, device=device) if options.dino else None

        for composed, pictures in compositions(concepts, references, options.together):
            before = list(done)
            title = " + ".join(one.name for one in composed if one.always_on == "no")

            def keep(comparison: Comparison, before: Sequence[Comparison] = before) -> None:
                done[:] = [*before, comparison]
                write_results(done, options.output)

            compare_methods(
                pipeline,
                host,
                composed,
                pictures,
                config,
                scorer,
                dino=other,
                on_progress=on_progress,
                on_row=keep,
                title=title if len(composed) < len(concepts) else "",
            )
    written = write_results(done, options.output)
    typer.echo(markdown_table(mean_rows(done)))
    typer.echo(f"Wrote {', '.join(path.name for path in written)} into {options.output}.")


def _checked(options: CompareOptions) -> tuple[CompareConfig, list[ConceptConfig], list[list[Any]]]:
    """The comparison, its concepts, and the reference images of each. Raises :class:`IterisError`
    for any mistake before a base is loaded."""
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods is empty; give names, such as base,alone,average,iteris.")
    kinds = {name: find_method(name).settings for name in names if name not in (BASE, ALONE)}
    drawing = Drawing(
        **options.drawing, scheduler=options.scheduler, size=picture_size(options.size)
    )
    settings, calibration = parse_by_method(kinds, options.setting or [])
    lines = read_lines(options.templates) if options.templates else None
    calibration = {"seed": drawing.seed, **calibration, **options.calibration}
    calibration |= given(templates=lines)
    preset = options.preset or "default"
    for name in kinds:
        settings_over(preset, name, settings[name], calibration)
    concepts = [parse_concept(text) for text in options.concept]
    compared = [concept for concept in concepts if concept.always_on == "no"]
    if options.refs is not None and len(options.refs) != len(compared):
        raise UsageError(
            "Give --refs once for each --concept, in the same order, or not at all: there are "
            f"{len(options.refs)} for {len(compared)}."
        )
    check_concepts(concepts)
    for line in warnings_of(concepts):
        console.print(escape(line), style="yellow", highlight=False)
    check_results_folder(options.output, overwrite=options.overwrite)
    references = [open_images(folder)[1] for folder in options.refs or []]
    templates = PROMPT_LISTS.get(options.prompts) or read_lines(Path(options.prompts))
    named = [replace(one.concept(), trigger=one.trigger or "x") for one in compared]
    fill_prompts(templates, named)
    compositions([one.concept() for one in concepts], references or named, options.together)
    if options.scheduler is not None:
        find_scheduler(options.scheduler)
    check_base(options.base)
    config = CompareConfig(
        names,
        templates,
        drawing,
        settings,
        calibration,
        preset,
        bytes_of(options.memory),
        options.collapse_below,
    )
    return config, concepts, references


@contextmanager
def _said_where_it_stopped(output: Path, done: Sequence[Any]) -> Generator[None]:
    """If anything stops the comparison, report which rows in ``output`` are finished."""
    try:
        yield
    except BaseException:
        if done:
            rows = ", ".join(done[-1].rows)
            console.print(f"Stopped early; {output} has what was finished: {rows}.", style="yellow")
        raise


def picture_size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None or "0" in match.groups():
        raise UsageError(f"--size {text!r} is not a number of pixels, or WIDTHxHEIGHT: 768x512.")
    width, height = int(match[1]), int(match[2] or match[1])
    if width % 8 or height % 8:
        nearest = "x".join(str(max(8, round(side / 8) * 8)) for side in (width, height))
        raise UsageError(f"--size {text!r}: both sides must be multiples of 8, such as {nearest}.")
    return width, height
