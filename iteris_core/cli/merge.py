"""``iteris merge``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..concepts import PRESERVE_WEIGHT, Concept
from ..errors import IterisError
from ..lora_files import Layout, ReadOptions, check_target
from ..merge import MergeResult, merge_loras
from ..methods import all_methods, find_method
from ..presets import PresetName
from .common import load_base, progress_bars
from .merge_model import is_model, merge_model
from .options import (
    PRESET_HELP,
    Dtype,
    Latents,
    calibration_option,
    given,
    parse_concept,
    parse_settings,
    read_lines,
)
from .processes import processes
from .recipe import calibration_of, concepts_of, cut_again, read_concepts, read_recipe, settings_of


def merge(
    base: Annotated[
        str,
        typer.Argument(
            help="Stable Diffusion: a diffusers folder, a .safetensors, a hub name; or a model of "
            "transformers"
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The .safetensors to write (transformers: a folder)"),
    ],
    concept: Annotated[
        list[str] | None,
        typer.Option(
            help="FILE, FILE:TRIGGER:CLASS or FILE:TRIGGER:CLASS:STRENGTH, such as 0.8, or 0.8/0.5 "
            "for model/text encoders; on a model of transformers FOLDER:SAMPLES or "
            "FOLDER:SAMPLES:STRENGTH. Give it once per LoRA"
        ),
    ] = None,
    from_file: Annotated[
        Path | None, typer.Option("--from", help="Run the merge again that wrote this file")
    ] = None,
    loras: Annotated[
        Path | None,
        typer.Option(
            help="With --from: the folder of the LoRAs, if they are not beside the merged file"
        ),
    ] = None,
    method: Annotated[str, typer.Option(help=", ".join(m.name for m in all_methods()))] = "iteris",
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="NAME=VALUE of the method or the calibration, such as rank=16, guidance=2.5; "
            "iteris methods lists all",
        ),
    ] = None,
    preset: Annotated[PresetName | None, typer.Option(help=PRESET_HELP)] = None,
    preserve: Annotated[
        Path | None, typer.Option(help="A text file of prompts on which the base is to stay")
    ] = None,
    preserve_weight: Annotated[
        float, typer.Option(help="What --preserve counts; much of it weakens the concepts", min=0)
    ] = PRESERVE_WEIGHT,
    templates: Annotated[
        Path | None, typer.Option(help="A text file of prompt templates, with {} for the concept")
    ] = None,
    samples: Annotated[int | None, calibration_option("samples")] = None,
    timesteps: Annotated[int | None, calibration_option("timesteps")] = None,
    latents: Annotated[Latents | None, calibration_option("latents")] = None,
    generate: Annotated[
        int | None,
        typer.Option(help="transformers: features while each LoRA writes so many tokens"),
    ] = None,
    model_class: Annotated[
        str | None,
        typer.Option(help="transformers: class of the base, where the adapter does not name one"),
    ] = None,
    latent_size: Annotated[int | None, calibration_option("latent_size")] = None,
    seed: Annotated[int | None, calibration_option("seed")] = None,
    layout: Annotated[Layout, typer.Option(help="Of the file; kohya is read everywhere")] = "kohya",
    dtype: Annotated[Dtype, typer.Option(help="Of the file")] = "float16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; the best by default")] = None,
    memory: Annotated[
        float | None,
        typer.Option(help="GiB that the merge may take beyond the model; what is free by default"),
    ] = None,
    allow_partial: Annotated[
        bool, typer.Option(help="Leave out what a LoRA cannot represent, and list it")
    ] = False,
    energy: Annotated[
        float, typer.Option(help="Share kept of changes that are not low rank by themselves")
    ] = 0.999,
    rename: Annotated[
        list[str] | None, typer.Option(help="LORA:NAME=NEW: another name for an embedding")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing output file")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON")] = False,
    plot: Annotated[Path | None, typer.Option(help="A PNG of the output errors per block")] = None,
) -> None:
    """Merge LoRAs on a Stable Diffusion base, or on a model of transformers, and write one."""
    recipe = read_recipe(from_file, loras) if from_file is not None else None
    if (recipe is None) == (not concept):
        raise IterisError("Give the LoRAs with --concept, or a merged file with --from.")
    if recipe is None and loras is not None:
        raise IterisError("--loras is for --from; --concept names the LoRAs' files itself.")
    method = method if recipe is None else recipe.method
    chosen = find_method(method)
    settings, calibration = parse_settings(chosen.settings, setting or [])
    calibration |= given(
        samples=samples,
        timesteps=timesteps,
        latents=latents,
        latent_size=latent_size,
        seed=seed,
        templates=read_lines(templates) if templates else None,
    )
    if recipe is not None:
        if preset is not None:
            raise IterisError(
                "--preset is not for --from, which has all settings; change single ones by --set."
            )
        settings = settings_of(recipe, chosen.settings, settings)
        calibration = calibration_of(recipe, calibration)
    options: dict[str, Any] = {
        "method": method,
        "preset": preset or "default",
        "settings": settings,
        "calibration": calibration,
    }
    budget = "free" if memory is None else round(memory * 2**30)
    if recipe is None and is_model(base, concept or []):
        for name, value in (("preserve", preserve), ("templates", templates), ("plot", plot)):
            if value is not None:
                raise IterisError(f"--{name} is for diffusion bases; {base} is a single model.")
        if overwrite:
            raise IterisError("--overwrite is for files; give another folder, or move the old one.")
        result = merge_model(
            base,
            concept or [],
            output,
            model_class=model_class,
            generate=generate,
            dtype=dtype,
            device=device,
            options={**options, "memory_budget": budget},
        )
        if result is not None:
            _report(result, output / "adapter_model.safetensors", as_json)
        return
    for name, value in (("generate", generate), ("model-class", model_class)):
        if value is not None:
            raise IterisError(
                f"--{name} is for models of transformers; {base} is no folder with a config.json, "
                "and no --concept is an adapter folder of peft."
            )
    chosen_files = [parse_concept(text) for text in concept or []]
    reading = ReadOptions(allow_partial, energy)
    check_target(output, layout, dtype, overwrite)

    from ..hosts.diffusers import DiffusersHost

    with (
        processes(device) as (group, own_device),
        progress_bars(shown=group.rank == 0) as on_progress,
    ):
        on_progress("loading the base", 0, 1)
        host = DiffusersHost(load_base(base, own_device))
        on_progress("loading the base", 1, 1)
        concepts = read_concepts(chosen_files, host, reading, rename or [])
        if recipe is not None:
            concepts = concepts_of(recipe, host, reading, rename or [])
        if preserve is not None:
            concepts.append(Concept.preserve(read_lines(preserve), preserve_weight))
        result = merge_loras(
            host,
            concepts,
            on_progress=on_progress,
            processes=group,
            memory_budget=budget,
            **options,
        )
        group.wait()
    if group.rank:
        return
    if recipe is not None:
        result = cut_again(recipe, result)
    path = result.save(output, layout=layout, dtype=dtype, overwrite=overwrite)
    if plot is not None:
        from ..report.plots import plot_residuals

        plot_residuals(result.report).savefig(plot)
    _report(result, path, as_json)


def _report(result: MergeResult, path: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"path": str(path), **result.report.to_dict()}))
    else:
        typer.echo(result.report.summary())
        typer.echo(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")
