"""``iteris merge``"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from ..concepts import Calibration, Concept
from ..config import MergeConfig
from ..errors import UsageError
from ..hosts.protocol import Host
from ..lora import Lora
from ..lora_files import Layout, ReadOptions, ReleasedBases, check_target
from ..lora_files.embeddings import embedding_targets
from ..lora_files.experts import expert_files, write_by_expert
from ..lora_files.metadata import trigger_phrases
from ..merge import MergeResult, merge_loras
from ..methods.registry import settings_over
from ..preview import preview_merge
from ..progress import Progress
from ..reading import read_concept
from ..report.card import card_files, write_card
from ..report.provenance import with_run
from ..saving import check_new
from .base import check_base, device_of, load_base
from .checks import (
    check_apart,
    check_concepts,
    check_embeddings,
    room_warnings,
    warnings_of,
)
from .common import console, progress_bars, save_or_keep, spelled, warn
from .inputs import open_picture
from .merge_file import MergeFile
from .options import CALIBRATION, bytes_of, command, given
from .request import MergeOptions, requested


@command(MergeOptions, Calibration, CALIBRATION)
def merge(context: typer.Context, options: MergeOptions, calibration: dict[str, Any]) -> None:
    """Merge LoRAs into one, on a diffusers pipeline.

    \b
    iteris merge BASE --concept cat.safetensors:sks:cat \\
      --concept dog.safetensors:zwx:dog -o both.safetensors
    iteris merge merge.yaml --preset best -o both.safetensors
    """
    console.quiet = options.quiet
    file = context.obj if isinstance(context.obj, MergeFile) else None
    config = requested(file, options, calibration)
    _check(config, options)
    reading = ReadOptions(options.allow_partial, options.energy)
    pictures = given(image=options.image, mask_image=options.mask_image)
    call = {name: open_picture(path) for name, path in pictures.items()}
    device = device_of(options.device)
    for line in [*warnings_of(config.concepts), *room_warnings(options.output, config.concepts)]:
        warn(line)
    with progress_bars(visible=not options.quiet) as show:

        def on_progress(progress: Progress) -> None:
            if not (options.plan and progress.plan):
                show(progress)

        on_progress(Progress("loading the base", 0, 1))
        loaded = _load(config, options, device, reading, call)
        on_progress(Progress("loading the base", 1, 1))
        how: dict[str, Any] = {**config.choices, "memory_budget": bytes_of(options.memory)}
        run = preview_merge if options.plan else merge_loras
        done = run(*loaded, on_progress=on_progress, **how)
    if not isinstance(done, MergeResult):
        if options.as_json:
            typer.echo(json.dumps(asdict(done)))
        elif not options.quiet:
            typer.echo("\n".join([*done.lines(), "Nothing was merged or written."]))
        return
    lora = with_run(done.lora, config.base, config.unmergeable)
    _write(replace(done, lora=lora), options)


def _check(config: MergeConfig, options: MergeOptions) -> None:
    """Raise :class:`IterisError` if the merge could not run or its result not be written."""
    output, overwrite = options.output, options.overwrite
    paths = expert_files(output) if any(one.low for one in config.concepts) else (output,)
    for path in paths:
        check_target(path, options.layout, options.dtype, overwrite)
        for beside in card_files(path) if options.card else ():
            check_new(beside, overwrite=overwrite)
    if config.base:
        check_base(config.base)
    else:
        for name in ("image", "mask_image", "base_dtype", "offload"):
            if getattr(options, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} is for merges on a base; name it before the LoRAs."
                )
    read = check_concepts(config.concepts)
    check_embeddings(read, paths[0], options.layout, overwrite=overwrite)
    check_apart(paths, config.concepts)
    settings_over(config.preset, config.method, config.settings, config.calibration)


def _load(
    config: MergeConfig,
    options: MergeOptions,
    device: str,
    reading: ReadOptions,
    call: dict[str, Any],
) -> tuple[Host | None, list[Concept]]:
    """The base, if there is one, with further arguments to ``call`` it, and the concepts with their
    LoRAs."""
    host = None
    if config.base:
        from ..hosts.diffusers import DiffusersHost

        how = {"dtype": options.base_dtype, "offload": options.offload}
        host = DiffusersHost(load_base(config.base, device, **how), **call)
    concepts = [read_concept(one, host or ReleasedBases(), reading) for one in config.concepts]
    check_embeddings(concepts, options.output, options.layout, overwrite=options.overwrite)
    return host, concepts


def _write(result: MergeResult, options: MergeOptions) -> None:
    def write(path: Path, layout: Layout | None, dtype: str) -> list[Path]:
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
