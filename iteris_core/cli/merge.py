"""``iteris merge``"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import typer

from ..concepts import Concept
from ..config import MergeConfig, read_concept, ready_to_merge
from ..errors import UsageError
from ..lora import Lora
from ..lora_files import ReadOptions, check_target
from ..lora_files.embeddings import embedding_files, sidecar_files
from ..lora_files.experts import expert_files, write_or_keep
from ..lora_files.metadata import noted_phrases, trigger_words
from ..merge import MergeResult, merge_loras
from ..methods.registry import find_method, settings_over
from ..passes.report import MergeReport
from ..preview import Preview, preview_merge
from ..progress import Progress
from ..report.card import write_card
from ..report.provenance import with_run
from ..saving import check_new, interrupts_wait
from .base import check_base, device_of, load_base
from .common import console, progress_bars, spelled, warn
from .inputs import check_apart, check_concepts, check_embeddings, open_picture, warnings_of
from .options import bytes_of, command, passed, store_of
from .request import MergeOptions, requested


@command(MergeOptions)
def merge(context: typer.Context, options: MergeOptions, calibration: dict[str, Any]) -> None:
    """Merge LoRAs into one, on a diffusers pipeline.

    \b
    iteris merge BASE --concept cat.safetensors:sks:cat \\
      --concept dog.safetensors:zwx:dog -o both.safetensors
    iteris merge merge.yaml --preset best -o both.safetensors
    """
    console.quiet = options.quiet
    config = requested(context.obj, options, calibration)
    _check(config, options)
    store = store_of(options.store) if config.base else None
    reading = ReadOptions(options.allow_partial, options.energy)
    pictures = passed(image=options.image, mask_image=options.mask_image)
    call = {name: open_picture(path) for name, path in pictures.items()}
    device = device_of(options.device)
    for line in warnings_of(config.concepts):
        warn(line)
    finished: list[MergeResult] = []
    preview, concepts = None, list[Concept]()
    try:
        with progress_bars(visible=not options.quiet) as show:

            def on_progress(progress: Progress) -> None:
                if not (options.plan and progress.plan):
                    show(progress)

            on_progress(Progress("loading the base", 0, 1))
            host = None
            if config.base:
                from ..hosts.diffusers import DiffusersHost

                pipeline = load_base(config.base, device, options.base_dtype, options.offload)
                host = DiffusersHost(pipeline, **call)
            concepts = [read_concept(concept, host, reading) for concept in config.concepts]
            check_embeddings(concepts, options.output, options.layout, overwrite=options.overwrite)
            on_progress(Progress("loading the base", 1, 1))
            how: dict[str, Any] = {**config.choices, "on_progress": on_progress}
            how |= {"memory_budget": bytes_of(options.memory), "store": store}
            how["rescue"] = finished.append
            if options.plan:
                preview = preview_merge(host, concepts, **how)
            else:
                finished.append(merge_loras(host, concepts, **how))
    except KeyboardInterrupt:
        if not finished:
            raise
    if preview is not None:
        _show(concepts, preview, options)
    for done in finished:
        with interrupts_wait() as pressed:
            _write(with_run(done.lora, config.base, config.unmergeable), done.report, options)
            pressed.clear()  # it is written


def _show(concepts: Sequence[Concept], preview: Preview, options: MergeOptions) -> None:
    if options.as_json:
        typer.echo(json.dumps(asdict(preview)))
    elif not options.quiet:
        loras = [concept for concept in concepts if concept.lora is not None]
        words = [f"{lora.name}: {'; '.join(lora.phrases) or 'every prompt'}" for lora in loras]
        typer.echo("\n".join([*words, *preview.lines(), "Nothing was merged or written."]))


def _check(config: MergeConfig, options: MergeOptions) -> None:
    """Raise :class:`IterisError` if the merge could not run or its result not be written."""
    output, overwrite = options.output, options.overwrite
    paths = expert_files(output) if any(concept.low for concept in config.concepts) else (output,)
    for path in paths:
        check_target(path, options.layout, options.dtype, overwrite)
        if options.card:
            check_new(path.with_suffix(".md"), overwrite=overwrite)
    if config.base:
        check_base(config.base)
    else:
        for name in ("image", "mask_image", "base_dtype", "offload"):
            if getattr(options, name) is not None:
                raise UsageError(
                    f"--{name.replace('_', '-')} is for merges on a base; name it before the LoRAs."
                )
    read = check_concepts(config.concepts)
    worded = [c.with_found_words(c.lora.metadata) for c in read if c.lora is not None]
    files = [replace(concept, lora=None) for concept in worded]  # which errors then name
    by_features = find_method(config.method).needs_host
    ready_to_merge(files, by_features=by_features, pictures=True)
    embeddings = check_embeddings(read, paths[0], options.layout, overwrite=overwrite)
    files = [file for concept in config.concepts for file in concept.files]
    beside = [embedding for file in files for embedding in sidecar_files(file)]
    check_apart([*paths, *embeddings], config.base, *files, *beside)
    settings_over(config.preset, config.method, config.settings, config.calibration)


def _write(lora: Lora, report: MergeReport, options: MergeOptions) -> None:
    how: dict[str, Any] = {"layout": options.layout, "dtype": options.dtype}
    paths = write_or_keep(lora, options.output, **how, overwrite=options.overwrite)
    lines = [spelled(report.summary())]
    lines += [f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB)." for path in paths]
    if lora.embeddings:
        files = embedding_files(paths[0], list(lora.embeddings))
        phrases = noted_phrases(lora.metadata) or trigger_words(lora.metadata)[:1]
        lines += [
            *(f"Its embedding {n} is in {f}: load it beside the LoRA." for n, f in files.items()),
            f"In prompts write {', '.join(map(repr, phrases))}; in ComfyUI put the files into "
            "models/embeddings and write embedding:FILE in place of a name.",
        ]
    if options.card:
        lines += [f"Wrote {write_card(path, report)}." for path in paths]
    if options.as_json:
        more = {"paths": [str(path) for path in paths]} if len(paths) > 1 else {}
        typer.echo(json.dumps({"path": str(paths[0]), **more, **report.to_dict()}))
    elif not options.quiet:
        typer.echo("\n".join(lines))
