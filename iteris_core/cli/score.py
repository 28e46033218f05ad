"""``iteris score`` and ``iteris compare``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..concepts import Calibration
from ..errors import IterisError
from ..lora_files import ReadOptions
from ..methods import find_method
from .common import Device, best_device, load_base, option, progress_bars
from .options import calibration_option, given, parse_concept, read_lines
from .recipe import read_concepts

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
ClipName = Annotated[str, option("An architecture of open_clip, or local-dir:FOLDER")]
ClipWeights = Annotated[
    str | None, option("A weights file or a tag of open_clip; openai by default")
]
DinoName = Annotated[str | None, option("A DINO model too: a hub name or a folder")]


def score(
    images: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them")],
    refs: Annotated[Path | None, option("A folder of reference pictures")] = None,
    prompts: Annotated[
        Path | None, option("A text file: one prompt per picture, or one for all")
    ] = None,
    clip: ClipName = "ViT-L-14",
    clip_weights: ClipWeights = None,
    dino: DinoName = None,
    device: Device = None,
    as_json: Annotated[bool, option("Print JSON", "--json")] = False,
) -> None:
    """CLIP image and text alignment of pictures: raw cosine and the CLIPScore scale."""
    from ..score import ClipScorer, DinoScorer, clip_score

    if refs is None and prompts is None:
        raise IterisError("There is nothing to score against: give --refs, --prompts or both.")
    files, pictures = open_images(*images)
    columns: dict[str, Any] = {}
    device = device or best_device()
    scorer = ClipScorer.load(clip, clip_weights, device=device)
    if refs is not None:
        _, references = open_images(refs)
        columns["image"] = scorer.image_alignment(pictures, references)
        if dino is not None:
            other = DinoScorer.load(dino, device=device)
            columns["dino"] = other.image_alignment(pictures, references)
    if prompts is not None:
        lines = read_lines(prompts)
        lines = lines * len(pictures) if len(lines) == 1 else lines
        columns["text"] = scorer.text_alignment(pictures, lines)
        columns["clipscore"] = clip_score(columns["text"])
    means = {name: float(values.mean()) for name, values in columns.items()}
    rows = [{name: float(v[index]) for name, v in columns.items()} for index in range(len(files))]
    if as_json:
        named = [{"file": str(file), **row} for file, row in zip(files, rows, strict=True)]
        typer.echo(json.dumps({"pictures": named, "mean": means}))
        return
    table = Table("picture", *columns)
    for name, row in zip([*(file.name for file in files), "mean"], [*rows, means], strict=True):
        style = "bold" if row is means else None
        table.add_row(name, *(f"{value:.4f}" for value in row.values()), style=style)
    Console().print(table)


def compare(
    base: Annotated[str, typer.Argument(help="Stable Diffusion, as for merge")],
    output: Annotated[Path, option("A folder for the results", "--output", "-o")],
    concept: Annotated[list[str], option("FILE:TRIGGER:CLASS, as for merge")],
    refs: Annotated[list[Path], option("A folder of pictures for each --concept")],
    methods: Annotated[
        str, option("Names with commas between, base for no LoRA")
    ] = "base,sum,average,iteris",
    prompts: Annotated[
        str,
        option(
            "composition, objects, animals, or a text file of prompts with {all}, or {1}, "
            "{2} …, for the concepts"
        ),
    ] = "composition",
    images_per_prompt: Annotated[int, option("Seeds per prompt")] = 4,
    steps: Annotated[int, option("Denoising steps")] = 25,
    guidance: Annotated[float, option("Guidance scale")] = 7.5,
    templates: Annotated[Path | None, option("Calibration templates")] = None,
    samples: Annotated[int | None, calibration_option("samples")] = None,
    latent_size: Annotated[int | None, calibration_option("latent_size")] = None,
    clip: ClipName = "ViT-L-14",
    clip_weights: ClipWeights = None,
    dino: DinoName = None,
    device: Device = None,
    seed: Annotated[int, option("Of calibration and pictures")] = 0,
) -> None:
    """Merge with several methods, draw the same prompts, score and show them side by side."""
    from ..hosts.diffusers import DiffusersHost
    from ..score import ClipScorer, DinoScorer
    from ..score.compare import BASE, PROMPT_LISTS, Drawing, compare_methods
    from ..score.statistics import markdown_table

    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        if name != BASE:
            find_method(name)
    options = [parse_concept(text) for text in concept]
    if len(refs) != len(options):
        raise IterisError(
            f"Give --refs once for each --concept, in the same order: there are {len(refs)} for "
            f"{len(options)}."
        )
    lines = read_lines(templates) if templates else None
    calibration = given(samples=samples, latent_size=latent_size, seed=seed, templates=lines)
    references = [open_images(folder)[1] for folder in refs]
    wanted = PROMPT_LISTS.get(prompts) or read_lines(Path(prompts))
    device = device or best_device()
    with progress_bars() as on_progress:
        pipeline = load_base(base, device)
        host = DiffusersHost(pipeline)
        concepts = read_concepts(options, host, ReadOptions(), [])
        comparison = compare_methods(
            pipeline,
            host,
            concepts,
            references,
            names,
            ClipScorer.load(clip, clip_weights, device=device),
            templates=wanted,
            drawing=Drawing(images_per_prompt, steps, guidance, seed),
            calibration=Calibration.from_mapping(calibration),
            dino=DinoScorer.load(dino, device=device) if dino else None,
            on_progress=on_progress,
        )
    written = comparison.write(output)
    typer.echo(markdown_table(comparison.rows))
    typer.echo(f"Wrote {', '.join(path.name for path in written)} into {output}.")


def open_images(*paths: Path) -> tuple[list[Path], list[Any]]:
    """Files and their pictures: single ones, and all of a folder by name."""
    from PIL import Image, UnidentifiedImageError

    found: list[Path] = []
    for path in paths:
        inside = sorted(path.iterdir()) if path.is_dir() else []
        files = [path] if path.is_file() else [f for f in inside if f.suffix.lower() in _IMAGES]
        if not files:
            kinds = ", ".join(_IMAGES)
            raise IterisError(f"{path} is no picture and no folder with pictures ({kinds}).")
        found += files
    pictures: list[Any] = []
    for file in found:
        try:
            pictures.append(Image.open(file).convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise IterisError(f"{file} is not a picture that can be read.") from error
    return found, pictures
