"""``iteris merge``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import typer
from rich.markup import escape

from ..concepts import Concept
from ..config import MergeConfig
from ..errors import UsageError
from ..hosts.protocol import Host
from ..lora_files import DTYPES, Layout, ReadOptions, ReleasedBases, check_target
from ..lora_files.experts import expert_files
from ..lora_files.peft_folder import check_folder, write_adapter
from ..merge import MergeResult
from ..methods.registry import settings_over
from ..reading import read_concept
from ..report.card import card_files, write_card
from ..report.provenance import check_cut, cut_again, with_run
from ..saving import check_new
from .adapters import check_adapters, load_adapters
from .base import check_base, load_base
from .checks import check_apart, check_concepts, room_warnings, warnings_of
from .common import Load, bytes_of, console, foresee, run_merge, spelled
from .merge_file import (
    SUFFIXES,
    MergeFile,
    check_merge_file,
    given_options,
    to_yaml,
    write_merge_file,
)
from .merge_options import MergeOptions
from .options import command, given
from .pictures import open_picture
from .request import merge_file_of, requested
from .saving import check_embeddings, lines_of_embeddings, save_lora, save_or_keep

_ONLY = "diffusion bases; {} is a single model."
_ASKED = (
    *("base", "output", "overwrite", "plan", "quiet", "from_file", "loras", "method", "preset"),
    *("unmergeable", "preserve", "preserve_weight", "templates"),
)
"""Options that a merge file writes differently, or not at all."""


@command(MergeOptions)
def merge(context: typer.Context, options: MergeOptions) -> None:
    """Merge LoRAs into one, on a diffusers pipeline or a transformers model.

    \b
    iteris merge BASE --concept cat.safetensors:sks:cat \\
      --concept dog.safetensors:zwx:dog -o both.safetensors
    iteris merge merge.yaml --preset best -o both.safetensors
    """
    console.quiet = options.quiet
    file = context.obj if isinstance(context.obj, MergeFile) else None
    config, adapter = requested(file, options)
    output = options.output
    if adapter:
        _refuse(_ONLY.format(config.base), options, "preserve")
    if output.suffix in SUFFIXES:
        others = given_options(context, output.parent, [*_ASKED, *options.calibration])
        check_merge_file(output, overwrite=options.overwrite)
        data = merge_file_of(config, output, others, "" if adapter else ".safetensors")
        write_merge_file(output, to_yaml(data, 100))
        typer.echo(f"Wrote {output}; nothing is merged yet. To merge: iteris merge {output}")
        return
    (_check_adapters if adapter else _check_pipeline)(config, options)
    experts = expert_files(output) if any(one.low for one in config.concepts) else ()
    for path in experts:
        check_target(path, options.layout, options.dtype, options.overwrite)
    for path in experts or (output,):
        for beside in card_files(path) if options.card else ():
            check_new(beside, overwrite=options.overwrite)
    check_apart([output, *experts], config.concepts)
    check_cut(config.cut)
    load = _loading(config, adapter, options)
    settings_over(config.preset, config.method, config.settings, config.calibration)
    for line in [*warnings_of(config.concepts), *room_warnings(output, config.concepts)]:
        console.print(escape(line), style="yellow", highlight=False)
    how = {**config.choices, "memory_budget": bytes_of(options.memory)}
    if options.plan:
        preview = foresee(options.device, load, how, quiet=options.quiet)
        if options.as_json:
            typer.echo(json.dumps(asdict(preview)))
        elif not options.quiet:
            typer.echo("\n".join([*preview.lines(), "Nothing was merged or written."]))
        return
    result = run_merge(options.device, load, how, quiet=options.quiet)
    if not adapter:
        lora = with_run(result.lora, config.base, config.unmergeable)
        result = replace(result, lora=cut_again(config.cut, lora))
    _write(result, config, adapter, options)


def _check_adapters(config: MergeConfig, options: MergeOptions) -> None:
    """Raise :class:`IterisError` if a merge of peft adapters could not run or be written."""
    names = ("templates", "card", "image", "base_dtype", "offload", "mask_image")
    _refuse(_ONLY.format(config.base), options, *names)
    _refuse("files; give another folder, or move the old one.", options, "overwrite")
    check_folder(options.output)
    check_adapters(config.concepts)


def _check_pipeline(config: MergeConfig, options: MergeOptions) -> None:
    """Raise :class:`IterisError` if a merge on a pipeline could not run or be written."""
    only = (
        f"transformers models; {config.base} is not a folder with a config.json, and no --concept "
        "is a peft adapter folder."
    )
    _refuse(only, options, "generate", "model_class")
    check_target(options.output, options.layout, options.dtype, options.overwrite)
    if config.base:
        check_base(config.base)
    else:
        why = "merges on a base; name it before the LoRAs."
        _refuse(why, options, "image", "mask_image", "base_dtype", "offload")
    read = check_concepts(config.concepts, renames=options.rename or [])
    low = any(one.low for one in config.concepts)
    beside = expert_files(options.output)[0] if low else options.output
    check_embeddings(read, beside, options.layout, overwrite=options.overwrite)


def _loading(config: MergeConfig, adapter: bool, options: MergeOptions) -> Load:
    """A function that loads the base and the LoRAs; images for the base are opened immediately."""
    reading = ReadOptions(options.allow_partial, options.energy)
    pictures = given(image=options.image, mask_image=options.mask_image)
    call = {name: open_picture(path) for name, path in pictures.items()}

    def load(device: str) -> tuple[Host | None, list[Concept]]:
        if adapter:
            model_class, generate = options.model_class, options.generate
            return load_adapters(config.base, config.concepts, model_class, generate, device)
        host = None
        if config.base:
            from ..hosts.diffusers import DiffusersHost

            how = {"dtype": options.base_dtype, "offload": options.offload}
            host = DiffusersHost(load_base(config.base, device, **how), **call)
        reader, renames = host or ReleasedBases(), options.rename or []
        concepts = [read_concept(one, reader, reading, renames) for one in config.concepts]
        check_embeddings(concepts, options.output, options.layout, overwrite=options.overwrite)
        return host, concepts

    return load


def _write(result: MergeResult, config: MergeConfig, adapter: bool, options: MergeOptions) -> None:
    def write(path: Path, layout: Layout | None, dtype: str) -> Sequence[Path]:
        if adapter:
            folder = write_adapter(result.lora, path, base=config.base, dtype=DTYPES[dtype])
            return [folder / "adapter_model.safetensors"]
        return save_lora(result.lora, options.overwrite, path, layout, dtype)

    in_words = not options.as_json and not options.quiet
    paths = save_or_keep(options.output, write, options.layout, options.dtype)
    if options.as_json:
        more = {"paths": [str(path) for path in paths]} if len(paths) > 1 else {}
        typer.echo(json.dumps({"path": str(paths[0]), **more, **result.report.to_dict()}))
    elif in_words:
        typer.echo(spelled(result.report.summary()))
        for path in paths:
            typer.echo(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB).")
        for line in lines_of_embeddings(result.lora, paths[0]):
            typer.echo(line)
    if options.card:
        for path in paths:
            written = write_card(path, result.report)
            if in_words:
                typer.echo(f"Wrote {' and '.join(map(str, written))}.")


def _refuse(why: str, options: MergeOptions, *names: str) -> None:
    """Raise if one of ``names`` was given: that option is for ``why``."""
    for name in names:
        if (value := getattr(options, name)) is not None and value is not False:
            raise UsageError(f"--{name.replace('_', '-')} is for {why}")
