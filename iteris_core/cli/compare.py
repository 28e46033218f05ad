"""``iteris compare`` and ``iteris score``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import ConceptConfig, read_concept
from ..errors import UsageError
from ..methods import find_method
from ..methods.registry import settings_over
from ..score.compare import Comparison, compare_methods
from ..score.drawing import Drawing
from ..score.measures import ALONE, BASE, PROMPT_LISTS, fill_prompts, markdown_table
from ..score.results import check_results_folder, write_results
from . import options as shared
from .base import check_base, device_of, load_base
from .common import print_table, progress_bars, warn
from .inputs import check_concepts, open_images, read_lines, warnings_of
from .merge_file import parse_concept
from .options import argument, command, given, offered, option, parse_settings

ClipName = Annotated[str, option("An open_clip architecture, or local-dir:FOLDER")]
ClipWeights = Annotated[str | None, option("A weights file or an open_clip tag; default: openai")]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """One field per option, with the option's name."""

    base: str = argument("A diffusers pipeline, as for merge")
    output: Path = offered("A folder for the results", "--output", "-o", default=...)
    concept: list[str] = offered(shared.CONCEPT_HELP, default=...)
    refs: list[Path] = offered("A folder of reference images, for each --concept", default=...)
    methods: str = offered(
        "Comma-separated names. base: no LoRA. alone: each LoRA by itself; the other rows then "
        "show their share of it",
        default="base,sum,average,iteris",
    )
    setting: list[str] | None = offered(
        "[METHOD.]NAME=VALUE, such as ties.density=0.3 or samples=25: for one method, for "
        "every method with that setting, or for the calibration",
        "--set",
        autocompletion=shared.setting_names,
    )
    preset: shared.Preset = None
    prompts: str = offered(
        "composition, objects, animals, or a text file of prompts with {each}, {all}, or {1}, "
        "{2} …, for the concepts. A concept's likeness is measured on prompts that name only "
        "that concept",
        panel=shared.PICTURES,
        default="composition",
    )
    templates: Path | None = offered(
        "A text file of prompt templates, with {} for the concept", panel=shared.CALIBRATION
    )
    clip: ClipName = "ViT-L-14"
    clip_weights: ClipWeights = None
    device: shared.Device = None
    base_dtype: shared.BaseDtype = None
    offload: shared.Offload = None
    memory: shared.Memory = None
    store: shared.Store = None
    overwrite: shared.Overwrite = False


@command(CompareOptions, Drawing, shared.PICTURES)
def compare(context: typer.Context, options: CompareOptions, drawing: dict[str, Any]) -> None:
    """Merge with several methods, draw the same prompts with each, and score the results side by
    side.

    \b
    iteris compare BASE -o results --methods base,alone,average,iteris \\
      --concept cat.safetensors:sks:cat --refs pictures/cat \\
      --concept dog.safetensors:zwx:dog --refs pictures/dog
    """
    from ..hosts.diffusers import DiffusersHost
    from ..score import ClipScorer

    listed, references, how = _checked(options, drawing)
    device = device_of(options.device)
    done: list[str] = []

    def keep(comparison: Comparison) -> None:
        write_results(comparison, options.output)
        done[:] = comparison.rows

    try:
        with progress_bars() as on_progress:
            pipeline = load_base(options.base, device, options.base_dtype, options.offload)
            host = DiffusersHost(pipeline)
            concepts = [read_concept(one, host) for one in listed]
            scorer = ClipScorer.load(options.clip, options.clip_weights, device=device)
            comparison = compare_methods(
                pipeline,
                host,
                concepts,
                references,
                scorer,
                on_progress=on_progress,
                on_row=keep,
                **how,
            )
    except BaseException:
        if done:
            warn(f"Stopped early; {options.output} has what was finished: {', '.join(done)}.")
        raise
    typer.echo(markdown_table(comparison.rows))
    typer.echo(f"Wrote comparison.json, comparison.md and sheet.png into {options.output}.")


def _checked(
    options: CompareOptions, pictures: Mapping[str, Any]
) -> tuple[list[ConceptConfig], list[list[Any]], dict[str, Any]]:
    """The concepts, their references and what :func:`compare_methods` gets by name, checked before
    a base is loaded."""
    names = [name.strip() for name in options.methods.split(",") if name.strip()]
    if not names:
        raise UsageError("--methods is empty; give names, such as base,alone,average,iteris.")
    kinds = {name: find_method(name).settings for name in names if name not in (BASE, ALONE)}
    drawing = Drawing(**pictures)
    settings, calibration = parse_settings(kinds, options.setting or [])
    lines = read_lines(options.templates) if options.templates else None
    calibration = {"seed": drawing.seed, **calibration, **given(templates=lines)}
    preset = options.preset or "default"
    for name in kinds:
        settings_over(preset, name, settings[name], calibration)
    concepts = [parse_concept(text) for text in options.concept]
    compared = [concept for concept in concepts if concept.always_on == "no"]
    if len(options.refs) != len(compared):
        raise UsageError(
            "Give --refs once for each --concept, in the same order: there are "
            f"{len(options.refs)} for {len(compared)}."
        )
    check_concepts(concepts)
    for line in warnings_of(concepts):
        warn(line)
    check_results_folder(options.output, overwrite=options.overwrite)
    references = [open_images(folder)[1] for folder in options.refs]
    templates = PROMPT_LISTS.get(options.prompts) or read_lines(Path(options.prompts))
    named = [replace(one.concept(), trigger=one.trigger or "x") for one in compared]
    fill_prompts(templates, named)
    check_base(options.base)
    how = {
        "methods": names,
        "templates": templates,
        "drawing": drawing,
        "settings": settings,
        "calibration": calibration,
        "preset": preset,
        "memory_budget": shared.bytes_of(options.memory),
        "store": shared.store_of(options.store),
    }
    return concepts, references, how


def score(
    images: Annotated[list[Path], typer.Argument(help="Images, or folders of images")],
    refs: Annotated[Path | None, option("A folder of reference images")] = None,
    prompts: Annotated[
        Path | None, option("A text file: one prompt per image, or one for all")
    ] = None,
    clip: ClipName = "ViT-L-14",
    clip_weights: ClipWeights = None,
    device: shared.Device = None,
    as_json: shared.AsJson = False,
) -> None:
    """Measure CLIP image and text alignment of images: raw cosine and the CLIPScore scale.

    \b
    iteris score pictures --refs references --prompts prompts.txt
    """
    from ..score import ClipScorer, clip_score

    if refs is None and prompts is None:
        raise UsageError("Nothing to score against: give --refs, --prompts or both.")
    files, pictures = open_images(*images)
    references = open_images(refs)[1] if refs is not None else None
    lines = read_lines(prompts) if prompts is not None else None
    if lines is not None and len(lines) not in (1, len(pictures)):
        raise UsageError(
            f"{prompts} has {len(lines)} prompts for {len(pictures)} images; write one per image, "
            "or one for all."
        )
    columns: dict[str, Any] = {}
    device = device_of(device)
    scorer = ClipScorer.load(clip, clip_weights, device=device)
    if references is not None:
        columns["image"] = scorer.image_alignment(pictures, references)
    if lines is not None:
        lines = lines * len(pictures) if len(lines) == 1 else lines
        columns["text"] = scorer.text_alignment(pictures, lines)
        columns["clipscore"] = clip_score(columns["text"])
    values = zip(*(column.tolist() for column in columns.values()), strict=True)
    rows = [dict(zip(columns, row, strict=True)) for row in values]
    means = {name: float(column.mean()) for name, column in columns.items()}
    if as_json:
        named = [{"file": str(file), **row} for file, row in zip(files, rows, strict=True)]
        typer.echo(json.dumps({"pictures": named, "mean": means}))
        return
    names = [*(file.name for file in files), "mean"]
    cells = [[f"{value:.4f}" for value in row.values()] for row in (*rows, means)]
    print_table(("picture", *columns), [[n, *row] for n, row in zip(names, cells, strict=True)])
