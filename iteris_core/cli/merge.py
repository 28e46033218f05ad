"""``iteris merge``"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from ..concepts import PRESERVE_WEIGHT, Concept
from ..errors import UsageError
from ..hosts.protocol import Host
from ..lora_files import DTYPES, Layout, ReadOptions, check_target
from ..lora_files.experts import expert_files
from ..lora_files.peft_folder import check_folder, write_adapter
from ..merge import settings_over
from ..report.provenance import with_run
from ..saving import atomically
from . import merge_options as options
from .adapters import load_adapters
from .asked import ask, ask_again, with_preserved
from .base import check_base, load_base
from .checks import check_adapters, check_apart, check_concepts, check_plot, warnings_of
from .common import BaseDtype, Device, Load, Memory, Offload, bytes_of, console, foresee, run_merge
from .concept_options import check_renames, read_concepts
from .merge_file import SUFFIXES, MergeFile, given_options, write_merge_file
from .options import given, read_lines, read_prompts
from .pictures import open_picture
from .recipe import check_cut, cut_again, read_recipe
from .saving import check_embeddings, lines_of_embeddings, save_lora, save_or_keep

_ONLY = "diffusion bases; {} is a single model."
_ASKED = (
    "base",
    "output",
    "overwrite",
    "plan",
    "quiet",
    "from_file",
    "loras",
    "preserve",
    "preserve_weight",
)
"""What a merge file has in other words, or for itself."""


def merge(
    context: typer.Context,
    output: options.Output,
    base: options.Base = None,
    concept: options.Concepts = None,
    preset: options.Preset = None,
    overwrite: options.Overwrite = False,
    plan: options.Plan = False,
    quiet: options.Quiet = False,
    method: options.MethodName = None,
    setting: options.Set = None,
    preserve: options.Preserve = None,
    preserve_weight: options.PreserveWeight = PRESERVE_WEIGHT,
    from_file: options.From = None,
    loras: options.Loras = None,
    templates: options.Templates = None,
    samples: options.Samples = None,
    timesteps: options.Timesteps = None,
    latents: options.LatentsOf = None,
    denoising_steps: options.DenoisingSteps = None,
    guidance: options.Guidance = None,
    empty_share: options.EmptyShare = None,
    contexts: options.Contexts = None,
    generic: options.Generic = None,
    composites: options.Composites = None,
    latent_size: options.LatentSize = None,
    frames: options.Frames = None,
    seed: options.Seed = None,
    generate: options.Generate = None,
    model_class: options.ModelClass = None,
    layout: options.FileLayout = None,
    dtype: options.FileDtype = "float16",
    image: options.Image = None,
    mask_image: options.MaskImage = None,
    device: Device = None,
    base_dtype: BaseDtype = None,
    offload: Offload = None,
    memory: Memory = None,
    allow_partial: options.AllowPartial = False,
    unmergeable: options.UnmergeableSites = None,
    energy: options.Energy = 0.999,
    rename: options.Rename = None,
    as_json: options.Json = False,
    plot: options.Plot = None,
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
        contexts=contexts,
        generic=generic,
        composites=composites,
        latent_size=latent_size,
        frames=frames,
        seed=seed,
        templates=read_lines(templates) if templates else None,
    )
    if from_file is not None:
        if concept or file.concepts:
            raise UsageError("Give the LoRAs with --concept, or a merged file with --from.")
        for name in given(preset=preset, method=method):
            raise UsageError(
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
        asked = with_preserved(asked, read_prompts(preserve), preserve_weight)
    if output.suffix in SUFFIXES:
        others = given_options(context, output.parent, [*_ASKED, *sampling])
        write_merge_file(output, asked.to_merge_file(output, others), overwrite=overwrite)
        typer.echo(f"Wrote {output}; nothing is merged yet. To merge: iteris merge {output}")
        return
    if adapter:
        only = _ONLY.format(base)
        _refuse(only, templates=templates, plot=plot, image=image)
        _refuse(only, base_dtype=base_dtype, offload=offload, mask_image=mask_image)
        _refuse("files; give another folder, or move the old one.", overwrite=overwrite or None)
        check_folder(output)
        check_adapters(asked.concepts)
    else:
        _refuse(
            f"models of transformers; {base} is no folder with a config.json, and no --concept is "
            "an adapter folder of peft.",
            generate=generate,
            model_class=model_class,
        )
        check_target(output, layout, dtype, overwrite)
        check_plot(plot)
        check_base(base)
        check_concepts(asked.concepts, run_base=asked.method.needs_host)
        if not asked.method.needs_host:
            name = asked.method.name
            _refuse(f"methods that run the base; {name} looks at weights only.", plot=plot)
    experts = expert_files(output) if any(one.low for one in asked.concepts) else ()
    for path in experts:
        check_target(path, layout, dtype, overwrite)
    check_apart([output, *experts], asked.concepts)
    check_cut(asked.cut or {})
    check_renames(rename or [])
    reading = ReadOptions(allow_partial, energy)
    pictures = {"image": image, "mask_image": mask_image}
    call = {name: open_picture(path) for name, path in pictures.items() if path is not None}
    settings_over(preset or "default", asked.method.name, asked.settings, asked.calibration)
    for line in warnings_of(asked.concepts):
        console.print(escape(line), style="yellow", highlight=False)

    def load(device: str) -> tuple[Host, list[Concept]]:
        if adapter:
            return load_adapters(base, asked.concepts, model_class, generate, device)
        from ..hosts.diffusers import DiffusersHost

        host = DiffusersHost(load_base(base, device, dtype=base_dtype, offload=offload), **call)
        concepts = read_concepts(asked.concepts, host, reading, rename or [])
        check_embeddings(concepts, output, layout, overwrite=overwrite)
        return host, concepts

    how: dict[str, Any] = {
        "method": asked.method.name,
        "preset": preset or "default",
        "settings": asked.settings,
        "calibration": asked.calibration,
        "unmergeable": asked.unmergeable,
        "memory_budget": bytes_of(memory),
    }
    if plan:
        _show_plan(device, load, how, quiet=quiet)
        return
    result = run_merge(device, load, how, quiet=quiet)
    if result is None:
        return
    if not adapter:
        metadata = with_run(result.lora.metadata, base, asked.unmergeable)
        result = replace(result, lora=replace(result.lora, metadata=metadata))
        result = cut_again(asked.cut or {}, result)
    merged = result.lora

    def write(path: Path, layout: Layout | None, dtype: str) -> Sequence[Path]:
        if adapter:
            folder = write_adapter(merged, path, base=base, dtype=DTYPES[dtype])
            return [folder / "adapter_model.safetensors"]
        return save_lora(merged, path, layout=layout, dtype=dtype, overwrite=overwrite)

    paths = save_or_keep(output, write, layout, dtype)
    if as_json:
        more = {"paths": [str(path) for path in paths]} if len(paths) > 1 else {}
        typer.echo(json.dumps({"path": str(paths[0]), **more, **result.report.to_dict()}))
    elif not quiet:
        typer.echo(result.report.summary())
        for path in paths:
            typer.echo(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")
        for line in lines_of_embeddings(result.lora, paths[0]):
            typer.echo(line)
    if plot is not None:
        from ..report.plots import plot_residuals

        with atomically(plot) as unfinished:
            plot_residuals(result.report).savefig(unfinished)
        if not as_json and not quiet:
            typer.echo(f"Wrote {plot}.")


def _show_plan(
    device: str | None,
    load: Load,
    how: Mapping[str, Any],
    *,
    quiet: bool,
) -> None:
    """What :func:`..preview.preview_merge` foresees of the merge."""
    preview = foresee(device, load, how, quiet=quiet)
    for line in preview.plan:
        typer.echo(line)
    if preview.denoised:
        typer.echo(f"{preview.denoised} forwards of one row come before, in which samples denoise.")
    if preview.complaint:
        typer.echo(f"Cannot be merged by features: {preview.complaint}.")
    typer.echo("Nothing was merged or written.")


def _refuse(why: str, **options: Any) -> None:
    """Raise for the first of ``options`` that was given: it is for ``why``."""
    for name in given(**options):
        raise UsageError(f"--{name.replace('_', '-')} is for {why}")
