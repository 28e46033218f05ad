"""``iteris merge``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..concepts import PRESERVE_WEIGHT, Calibration, Concept
from ..errors import IterisError, brief
from ..hosts.protocol import Host
from ..lora import Lora
from ..lora_files import DTYPES, Layout, ReadOptions, check_target, write_lora
from ..lora_files.experts import expert_files, second_of, split_experts
from ..lora_files.peft_folder import check_folder, write_adapter
from ..merge import Unmergeable
from ..methods import all_methods, find_method
from ..presets import PresetName
from .adapters import AdapterOption, is_model, load_adapters, parse_adapter
from .common import BaseDtype, Device, Offload, load_base, option, run_merge
from .learned import lines_of_embeddings
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
from .recipe import concepts_of, cut_again, read_concepts, read_recipe


def merge(
    base: Annotated[
        str,
        typer.Argument(
            help="A pipeline of diffusers (a folder, a .safetensors, a hub name), or a model of "
            "transformers"
        ),
    ],
    output: Annotated[
        Path, option("The .safetensors to write (transformers: a folder)", "--output", "-o")
    ],
    concept: Annotated[
        list[str] | None,
        option(
            "FILE, FILE:TRIGGER:CLASS or FILE:TRIGGER:CLASS:STRENGTH, such as 0.8, or 0.8/0.5 "
            "for model/text encoders; HIGH+LOW for FILE where the base has two experts; on a model "
            "of transformers FOLDER:SAMPLES or FOLDER:SAMPLES:STRENGTH. Give it once per LoRA"
        ),
    ] = None,
    from_file: Annotated[
        Path | None, option("Run the merge again that wrote this file", "--from")
    ] = None,
    loras: Annotated[
        Path | None,
        option("With --from: the folder of the LoRAs, if they are not beside the merged file"),
    ] = None,
    method: Annotated[str, option(", ".join(m.name for m in all_methods()))] = "iteris",
    setting: Annotated[
        list[str] | None,
        option(
            "NAME=VALUE of the method or the calibration, such as rank=16, guidance=2.5; "
            "iteris methods lists all",
            "--set",
        ),
    ] = None,
    preset: Annotated[PresetName | None, option(PRESET_HELP)] = None,
    preserve: Annotated[
        Path | None, option("A text file of prompts on which the base is to stay")
    ] = None,
    preserve_weight: Annotated[
        float, option("What --preserve counts; much of it weakens the concepts", min=0)
    ] = PRESERVE_WEIGHT,
    templates: Annotated[
        Path | None, option("A text file of prompt templates, with {} for the concept")
    ] = None,
    samples: Annotated[int | None, calibration_option("samples")] = None,
    timesteps: Annotated[int | None, calibration_option("timesteps")] = None,
    latents: Annotated[Latents | None, calibration_option("latents")] = None,
    generate: Annotated[
        int | None, option("transformers: features while each LoRA writes so many tokens")
    ] = None,
    model_class: Annotated[
        str | None, option("transformers: class of the base, where the adapter does not name one")
    ] = None,
    latent_size: Annotated[int | None, calibration_option("latent_size")] = None,
    seed: Annotated[int | None, calibration_option("seed")] = None,
    layout: Annotated[
        Layout | None,
        option("Of the file; kohya by default, or peft where a base has no such names"),
    ] = None,
    dtype: Annotated[Dtype, option("Of the file")] = "float16",
    frames: Annotated[int | None, calibration_option("frames")] = None,
    image: Annotated[
        Path | None, option("A picture for a base that asks for one: to edit, to begin with, …")
    ] = None,
    mask_image: Annotated[
        Path | None, option("Which part of --image an inpainting base paints")
    ] = None,
    device: Device = None,
    base_dtype: BaseDtype = None,
    offload: Offload = None,
    memory: Annotated[
        float | None,
        option("GiB that the merge may take beyond the model; what is free by default"),
    ] = None,
    allow_partial: Annotated[
        bool, option("Leave out what a LoRA cannot represent, and list it")
    ] = False,
    unmergeable: Annotated[
        Unmergeable,
        option("Layers whose features cannot be collected: refuse, skip, or take the LoRAs' mean"),
    ] = "refuse",
    energy: Annotated[
        float, option("Share kept of changes that are not low rank by themselves")
    ] = 0.999,
    rename: Annotated[
        list[str] | None, option("LORA:NAME=NEW: another name for an embedding")
    ] = None,
    overwrite: Annotated[bool, option("Replace an existing output file")] = False,
    as_json: Annotated[bool, option("Print the report as JSON", "--json")] = False,
    plot: Annotated[Path | None, option("A PNG of the output errors per block")] = None,
) -> None:
    """Merge LoRAs on a pipeline of diffusers, or on a model of transformers, and write one."""
    recipe = read_recipe(from_file, loras) if from_file is not None else None
    if (recipe is None) == (not concept):
        raise IterisError("Give the LoRAs with --concept, or a merged file with --from.")
    if recipe is None:
        _refuse("--from; --concept names the LoRAs' files itself.", loras=loras)
    elif preset is not None:
        raise IterisError(
            "--preset is not for --from, which has all settings; change single ones by --set."
        )
    chosen = find_method(method if recipe is None else recipe.method)
    settings, calibration = parse_settings(chosen.settings, setting or [])
    calibration |= given(
        samples=samples,
        timesteps=timesteps,
        latents=latents,
        latent_size=latent_size,
        frames=frames,
        seed=seed,
        templates=read_lines(templates) if templates else None,
    )
    if recipe is not None:
        settings = recipe.over("settings", settings, chosen.settings)
        calibration = recipe.over("calibration", calibration, Calibration)
    options: dict[str, Any] = {
        "method": chosen.name,
        "preset": preset or "default",
        "settings": settings,
        "calibration": calibration,
        "unmergeable": unmergeable,
        "memory_budget": "free" if memory is None else round(memory * 2**30),
    }
    adapters: list[AdapterOption] = []
    if recipe is None and is_model(base, concept or []):
        only = f"diffusion bases; {base} is a single model."
        _refuse(only, preserve=preserve, templates=templates, plot=plot, image=image)
        _refuse(only, base_dtype=base_dtype, offload=offload, mask_image=mask_image)
        _refuse("files; give another folder, or move the old one.", overwrite=overwrite or None)
        check_folder(output)
        adapters = [parse_adapter(text) for text in concept or []]
    else:
        _refuse(
            f"models of transformers; {base} is no folder with a config.json, and no --concept is "
            "an adapter folder of peft.",
            generate=generate,
            model_class=model_class,
        )
        check_target(output, layout, dtype, overwrite)
    files = [parse_concept(text) for text in concept or [] if not adapters]
    for path in expert_files(output) if any(file.low for file in files) else ():
        check_target(path, layout, dtype, overwrite)
    reading = ReadOptions(allow_partial, energy)

    def load(device: str) -> tuple[Host, list[Concept]]:
        if adapters:
            return load_adapters(base, adapters, model_class, generate, device)
        from ..hosts.diffusers import DiffusersHost

        pictures = {"image": image, "mask_image": mask_image}
        call = {name: open_picture(path) for name, path in pictures.items() if path is not None}
        pipeline = load_base(base, device, dtype=base_dtype, offload=offload)
        host = DiffusersHost(pipeline, **call)
        if recipe is not None:
            concepts = concepts_of(recipe, host, reading, rename or [])
        else:
            concepts = read_concepts(files, host, reading, rename or [])
        if preserve is not None:
            concepts.append(Concept.preserve(read_lines(preserve), preserve_weight))
        return host, concepts

    result = run_merge(device, load, options)
    if result is None:
        return
    if adapters:
        folder = write_adapter(result.lora, output, base=base, dtype=DTYPES[dtype])
        paths = [folder / "adapter_model.safetensors"]
    else:
        result = cut_again(recipe, result) if recipe is not None else result
        paths = save_lora(result.lora, output, layout=layout, dtype=dtype, overwrite=overwrite)
    if plot is not None:
        from ..report.plots import plot_residuals

        plot_residuals(result.report).savefig(plot)
    if as_json:
        more = {"paths": [str(path) for path in paths]} if len(paths) > 1 else {}
        typer.echo(json.dumps({"path": str(paths[0]), **more, **result.report.to_dict()}))
        return
    typer.echo(result.report.summary())
    for path in paths:
        typer.echo(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")
    for line in lines_of_embeddings(result.lora, paths[0]):
        typer.echo(line)


def save_lora(
    lora: Lora, path: Path, *, layout: Layout | None, dtype: str, overwrite: bool
) -> list[Path]:
    """Write a LoRA to ``path``, or that of two experts to a file each."""
    denoiser = lora.base.architecture.denoiser if lora.base is not None else ""
    parts = {path: lora}
    if any(site.startswith(f"{second_of(denoiser)}.") for site in lora.sites):
        parts = dict(zip(expert_files(path), split_experts(lora, denoiser), strict=True))
    how: dict[str, Any] = {"layout": layout, "dtype": dtype, "overwrite": overwrite}
    return [write_lora(part, target, **how) for target, part in parts.items()]


def open_picture(path: Path) -> Any:
    """An RGB picture. Raises :class:`IterisError` where there is none."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise IterisError(f"{path} is no picture that can be read ({brief(error)}).") from error


def _refuse(why: str, **options: Any) -> None:
    """Raise for the first of ``options`` that was given: it is for ``why``."""
    for name in given(**options):
        raise IterisError(f"--{name.replace('_', '-')} is for {why}")
