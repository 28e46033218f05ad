"""``iteris merge``"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..concepts import PRESERVE_WEIGHT, Concept
from ..errors import IterisError
from ..hosts.protocol import Host
from ..lora_files import DTYPES, Layout, ReadOptions, check_target
from ..lora_files.experts import expert_files
from ..lora_files.peft_folder import check_folder, write_adapter
from ..merge import Unmergeable
from ..methods import all_methods
from ..presets import PresetName
from ..report.provenance import with_run
from .adapters import check_adapter, load_adapters
from .asked import ask, ask_again, with_preserved
from .common import (
    BaseDtype,
    Device,
    Memory,
    Offload,
    bytes_of,
    check_folder_of,
    load_base,
    option,
    run_merge,
)
from .concept_options import read_concepts
from .merge_file import SUFFIXES, MergeFile, given_options, use_merge_file, write_merge_file
from .options import (
    CONCEPT_HELP,
    PRESET_HELP,
    Dtype,
    Latents,
    calibration_option,
    given,
    method_names,
    read_lines,
    setting_names,
)
from .pictures import open_picture
from .recipe import cut_again, read_recipe
from .saving import lines_of_embeddings, save_lora

_ONLY = "diffusion bases; {} is a single model."
_ASKED = ("base", "output", "overwrite", "from_file", "loras", "preserve", "preserve_weight")
"""What a merge file has in other words, or for itself."""


def merge(
    context: typer.Context,
    output: Annotated[
        Path,
        option(
            "The .safetensors to write (transformers: a folder); a .yaml writes what is asked for "
            "as a merge file instead, and merges nothing",
            "--output",
            "-o",
        ),
    ],
    base: Annotated[
        str | None,
        typer.Argument(
            help="A pipeline of diffusers (a folder, a .safetensors, a hub name), a model of "
            "transformers, or a merge file (.yaml), in which every option is a key",
            is_eager=True,
            callback=use_merge_file,
        ),
    ] = None,
    concept: Annotated[list[str] | None, option(CONCEPT_HELP)] = None,
    from_file: Annotated[
        Path | None,
        option("Run the merge again that wrote this file; BASE is looked for beside it", "--from"),
    ] = None,
    loras: Annotated[
        Path | None,
        option("With --from or a merge file: the folder of the LoRAs, if they are not beside it"),
    ] = None,
    method: Annotated[
        str | None,
        option(
            f"{', '.join(m.name for m in all_methods())}; iteris by default",
            autocompletion=method_names,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        option(
            "NAME=VALUE of the method or the calibration, such as rank=16, guidance=2.5; "
            "iteris methods lists all",
            "--set",
            autocompletion=setting_names,
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
    denoising_steps: Annotated[int | None, calibration_option("denoising_steps")] = None,
    guidance: Annotated[float | None, calibration_option("guidance")] = None,
    empty_share: Annotated[float | None, calibration_option("empty_share")] = None,
    latent_size: Annotated[int | None, calibration_option("latent_size")] = None,
    frames: Annotated[int | None, calibration_option("frames")] = None,
    seed: Annotated[int | None, calibration_option("seed")] = None,
    generate: Annotated[
        int | None, option("transformers: features while each LoRA writes so many tokens")
    ] = None,
    model_class: Annotated[
        str | None, option("transformers: class of the base, where the adapter does not name one")
    ] = None,
    layout: Annotated[
        Layout | None,
        option("Of the file; kohya by default, or peft where a base has no such names"),
    ] = None,
    dtype: Annotated[Dtype, option("Of the file")] = "float16",
    image: Annotated[
        Path | None, option("A picture for a base that asks for one: to edit, to begin with, …")
    ] = None,
    mask_image: Annotated[
        Path | None, option("Which part of --image an inpainting base paints")
    ] = None,
    device: Device = None,
    base_dtype: BaseDtype = None,
    offload: Offload = None,
    memory: Memory = None,
    allow_partial: Annotated[
        bool, option("Leave out what a LoRA cannot represent, and list it", "--allow-partial")
    ] = False,
    unmergeable: Annotated[
        Unmergeable | None,
        option(
            "Layers whose features cannot be collected: refuse (default), skip, or take the LoRAs' "
            "mean"
        ),
    ] = None,
    energy: Annotated[
        float, option("Share kept of changes that are not low rank by themselves")
    ] = 0.999,
    rename: Annotated[
        list[str] | None, option("LORA:NAME=NEW: another name for an embedding")
    ] = None,
    overwrite: Annotated[bool, option("Replace an existing output file", "--overwrite")] = False,
    as_json: Annotated[bool, option("Print the report as JSON", "--json")] = False,
    plot: Annotated[Path | None, option("A PNG of the output errors per block")] = None,
) -> None:
    """Merge LoRAs on a pipeline of diffusers, or on a model of transformers, and write one."""
    file = context.obj if isinstance(context.obj, MergeFile) else MergeFile()
    sampling = given(
        samples=samples,
        timesteps=timesteps,
        latents=latents,
        denoising_steps=denoising_steps,
        guidance=guidance,
        empty_share=empty_share,
        latent_size=latent_size,
        frames=frames,
        seed=seed,
        templates=read_lines(templates) if templates else None,
    )
    if from_file is not None:
        if concept or file.concepts:
            raise IterisError("Give the LoRAs with --concept, or a merged file with --from.")
        for name in given(preset=preset, method=method):
            raise IterisError(
                f"--{name} is not for --from, which has all settings; change single ones by --set."
            )
        recipe = read_recipe(from_file, loras)
        asked = ask_again(recipe, base, setting or [], sampling, unmergeable)
    else:
        if file.path is None:
            _refuse("--from; --concept names the LoRAs' files itself.", loras=loras)
        method, pairs = method or "iteris", setting or []
        asked = ask(file, base, method, concept or [], loras, pairs, sampling, unmergeable)
    base, adapter = asked.base, asked.adapter
    if preserve is not None:
        _refuse(_ONLY.format(base), preserve=preserve if adapter else None)
        asked = with_preserved(asked, read_lines(preserve), preserve_weight)
    if output.suffix in SUFFIXES:
        options = given_options(context, output.parent, [*_ASKED, *sampling])
        write_merge_file(output, asked.to_merge_file(output, options), overwrite=overwrite)
        typer.echo(f"Wrote {output}; nothing is merged yet. To merge: iteris merge {output}")
        return
    if adapter:
        only = _ONLY.format(base)
        _refuse(only, templates=templates, plot=plot, image=image)
        _refuse(only, base_dtype=base_dtype, offload=offload, mask_image=mask_image)
        _refuse("files; give another folder, or move the old one.", overwrite=overwrite or None)
        check_folder(output)
        for one in asked.concepts:
            check_adapter(one)
    else:
        _refuse(
            f"models of transformers; {base} is no folder with a config.json, and no --concept is "
            "an adapter folder of peft.",
            generate=generate,
            model_class=model_class,
        )
        check_target(output, layout, dtype, overwrite)
        check_folder_of(plot)
        if not asked.method.needs_host:
            name = asked.method.name
            _refuse(f"methods that run the base; {name} looks at weights only.", plot=plot)
    for path in expert_files(output) if any(one.low for one in asked.concepts) else ():
        check_target(path, layout, dtype, overwrite)

    def load(device: str) -> tuple[Host, list[Concept]]:
        if adapter:
            return load_adapters(base, asked.concepts, model_class, generate, device)
        from ..hosts.diffusers import DiffusersHost

        pictures = {"image": image, "mask_image": mask_image}
        call = {name: open_picture(path) for name, path in pictures.items() if path is not None}
        host = DiffusersHost(load_base(base, device, dtype=base_dtype, offload=offload), **call)
        reading = ReadOptions(allow_partial, energy)
        return host, read_concepts(asked.concepts, host, reading, rename or [])

    how: dict[str, Any] = {
        "method": asked.method.name,
        "preset": preset or "default",
        "settings": asked.settings,
        "calibration": asked.calibration,
        "unmergeable": asked.unmergeable,
        "memory_budget": bytes_of(memory),
    }
    result = run_merge(device, load, how)
    if result is None:
        return
    if adapter:
        folder = write_adapter(result.lora, output, base=base, dtype=DTYPES[dtype])
        paths = [folder / "adapter_model.safetensors"]
    else:
        metadata = with_run(result.lora.metadata, base, asked.unmergeable)
        result = replace(result, lora=replace(result.lora, metadata=metadata))
        result = cut_again(asked.cut or {}, result)
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


def _refuse(why: str, **options: Any) -> None:
    """Raise for the first of ``options`` that was given: it is for ``why``."""
    for name in given(**options):
        raise IterisError(f"--{name.replace('_', '-')} is for {why}")
