"""``iteris merge``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from ..concepts import Calibration, Concept
from ..config import MergeConfig
from ..errors import UsageError
from ..hosts.protocol import Host
from ..lora import Lora
from ..lora_files import DTYPES, Layout, ReadOptions, ReleasedBases, check_target
from ..lora_files.embeddings import embedding_targets
from ..lora_files.experts import expert_files, write_by_expert
from ..lora_files.metadata import trigger_phrases
from ..lora_files.peft_folder import check_folder, write_adapter
from ..merge import MergeResult, merge_loras
from ..methods.registry import settings_over
from ..preview import preview_merge
from ..progress import Progress
from ..reading import read_concept
from ..report.card import card_files, write_card
from ..report.provenance import check_cut, cut_again, with_run
from ..saving import check_new
from .adapters import check_adapters, load_adapters
from .base import check_base, device_of, load_base
from .checks import check_apart, check_concepts, check_embeddings, warnings_of
from .common import console, progress_bars, save_or_keep, spelled, warn
from .inputs import open_picture
from .merge_file import MergeFile
from .options import CALIBRATION, bytes_of, command, given
from .request import MergeOptions, requested

_ONLY = "diffusion bases; {} is a single model."


@command(MergeOptions, Calibration, CALIBRATION)
def merge(context: typer.Context, options: MergeOptions, calibration: dict[str, Any]) -> None:
    """Merge LoRAs into one, on a diffusers pipeline or a transformers model.

    \b
    iteris merge BASE --concept cat.safetensors:sks:cat \\
      --concept dog.safetensors:zwx:dog -o both.safetensors
    iteris merge merge.yaml --preset best -o both.safetensors
    """
    console.quiet = options.quiet
    file = context.obj if isinstance(context.obj, MergeFile) else None
    config, adapter = requested(file, options, calibration)
    (_check_adapters if adapter else _check_pipeline)(config, options)
    output = options.output
    experts = expert_files(output) if any(one.low for one in config.concepts) else ()
    for path in experts:
        check_target(path, options.layout, options.dtype, options.overwrite)
    for path in experts or (output,):
        for beside in card_files(path) if options.card else ():
            check_new(beside, overwrite=options.overwrite)
    check_apart([output, *experts], config.concepts)
    check_cut(config.cut)
    pictures = given(image=options.image, mask_image=options.mask_image)
    call = {name: open_picture(path) for name, path in pictures.items()}
    settings_over(config.preset, config.method, config.settings, config.calibration)
    device = device_of(options.device)
    for line in warnings_of(config.concepts):
        warn(line)
    with progress_bars(visible=not options.quiet) as show:

        def on_progress(progress: Progress) -> None:
            if not (options.plan and progress.plan):
                show(progress)

        on_progress(Progress("loading the base", 0, 1))
        if adapter:
            model_class, generate = options.model_class, options.generate
            loaded = load_adapters(config.base, config.concepts, model_class, generate, device)
        else:
            loaded = _load(config, options, device, call)
        on_progress(Progress("loading the base", 1, 1))
        budget = bytes_of(options.memory)
        how = {**config.choices, "memory_budget": budget, "on_progress": on_progress}
        done = (preview_merge if options.plan else merge_loras)(*loaded, **how)
    if not isinstance(done, MergeResult):
        if options.as_json:
            typer.echo(json.dumps(asdict(done)))
        elif not options.quiet:
            typer.echo("\n".join([*done.lines(), "Nothing was merged or written."]))
        return
    if not adapter:
        lora = with_run(done.lora, config.base, config.unmergeable)
        done = replace(done, lora=cut_again(config.cut, lora))
    _write(done, config, adapter, options)


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
    read = check_concepts(config.concepts)
    low = any(one.low for one in config.concepts)
    beside = expert_files(options.output)[0] if low else options.output
    check_embeddings(read, beside, options.layout, overwrite=options.overwrite)


def _refuse(why: str, options: MergeOptions, *names: str) -> None:
    """Raise if one of ``names`` was given: that option is for ``why``."""
    for name in names:
        if (value := getattr(options, name)) is not None and value is not False:
            raise UsageError(f"--{name.replace('_', '-')} is for {why}")


def _load(
    config: MergeConfig, options: MergeOptions, device: str, call: dict[str, Any]
) -> tuple[Host | None, list[Concept]]:
    """The base, if there is one, and the concepts with their LoRAs."""
    host = None
    if config.base:
        from ..hosts.diffusers import DiffusersHost

        how = {"dtype": options.base_dtype, "offload": options.offload}
        host = DiffusersHost(load_base(config.base, device, **how), **call)
    reading = ReadOptions(options.allow_partial, options.energy)
    concepts = [read_concept(one, host or ReleasedBases(), reading) for one in config.concepts]
    check_embeddings(concepts, options.output, options.layout, overwrite=options.overwrite)
    return host, concepts


def _write(result: MergeResult, config: MergeConfig, adapter: bool, options: MergeOptions) -> None:
    def write(path: Path, layout: Layout | None, dtype: str) -> Sequence[Path]:
        if adapter:
            folder = write_adapter(result.lora, path, base=config.base, dtype=DTYPES[dtype])
            return [folder / "adapter_model.safetensors"]
        return write_by_expert(
            result.lora, path, layout=layout, dtype=dtype, overwrite=options.overwrite
        )

    paths = save_or_keep(options.output, write, options.layout, options.dtype)
    lines = [spelled(result.report.summary())]
    lines += [f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB)." for path in paths]
    lines += _lines_of_embeddings(result.lora, paths[0])
    if options.card:
        cards = [write_card(path, result.report) for path in paths]
        lines += [f"Wrote {' and '.join(map(str, files))}." for files in cards]
    if options.as_json:
        more = {"paths": [str(path) for path in paths]} if len(paths) > 1 else {}
        typer.echo(json.dumps({"path": str(paths[0]), **more, **result.report.to_dict()}))
    elif not options.quiet:
        typer.echo("\n".join(lines))


def _lines_of_embeddings(lora: Lora, path: Path) -> list[str]:
    """Lines about the embeddings of the LoRA in ``path``: their files and trigger words."""
    if not lora.embeddings:
        return []
    files = embedding_targets(path, list(lora.embeddings), overwrite=True)
    phrases = ", ".join(map(repr, trigger_phrases(lora.metadata)))
    return [
        *(f"Its embedding {n} is in {file}: load it beside the LoRA." for n, file in files.items()),
        f"In prompts write {phrases}; in ComfyUI put the files into models/embeddings and write "
        "embedding:FILE in place of a name.",
    ]
