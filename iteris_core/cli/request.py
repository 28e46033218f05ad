"""The merge request of ``iteris merge``: the command line overrides a merge file, or the recipe in
a merged file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from ..concepts import Calibration
from ..config import ConceptConfig, MergeConfig
from ..errors import ConceptError, MergeFileError, RecipeError, SettingsError, UsageError
from ..lora_files import read_tensors
from ..lora_files.metadata import parse_object
from ..methods import find_method
from ..report.provenance import check_cut
from .adapters import is_model
from .base import BUNDLED
from .concept_options import concept_of, first_name, found_in
from .merge_file import KEYS, MergeFile, relative_name
from .merge_options import MergeOptions
from .options import check_settings, given, parse_settings, read_lines, read_prompts

_WHOLE = ("method", "settings", "calibration", "concepts")
"""Keys of every recipe."""
_AFTER = ("cut", "strength", "base", "unmergeable")
"""Extra keys, in files that were cut or scaled, or that ``iteris merge`` wrote."""


def requested(file: MergeFile | None, options: MergeOptions) -> tuple[MergeConfig, bool]:
    """The merge, and whether its base is a single transformers model with peft adapters as
    concepts. Raises :class:`IterisError` for anything missing, unknown or broken."""
    config, adapter = (_again if options.from_file else _written)(file, options)
    settings, calibration = parse_settings(
        find_method(config.method).settings, options.setting or []
    )
    calibration |= options.calibration
    if options.templates:
        calibration["templates"] = read_lines(options.templates)
    changes: dict[str, Any] = {
        "settings": {**config.settings, **settings},
        "calibration": {**config.calibration, **calibration},
        **given(unmergeable=options.unmergeable, preset=options.preset),
    }
    if options.preserve and not adapter:
        kept = ConceptConfig.preserve(read_prompts(options.preserve), options.preserve_weight)
        changes["concepts"] = (*config.concepts, kept)
    return config.model_copy(update=changes), adapter


def _written(file: MergeFile | None, options: MergeOptions) -> tuple[MergeConfig, bool]:
    """The concepts from the command line or the merge ``file``, and its other keys."""
    entries: Sequence[Any] = options.concept or (file.entries if file else [])
    if not entries:
        raise UsageError(
            f"{file.path} has no LoRAs: list them under concepts:, or give them with --concept."
            if file
            else "Give the LoRAs with --concept, or a merged file with --from."
        )
    if file is None and options.loras is not None:
        raise UsageError("--loras is for --from; --concept already names the LoRA files.")
    if options.base is None and find_method(options.method or "iteris").needs_host:
        raise UsageError("Name the base: BASE on the command line, or base: in the merge file.")
    of_file = file if not options.concept else None
    names = of_file.folders() if of_file else [first_name(text) for text in entries]
    adapter = options.base is not None and is_model(options.base, names)

    where, find = (str(of_file.path), of_file.find) if of_file else ("--concept", Path)
    concepts = [
        concept_of(entry, f"{where}: concept {number}", find, adapter=adapter)
        for number, entry in enumerate(entries, 1)
    ]
    if of_file:
        folders = _folders(options.loras, of_file.path)
        concepts = [found_in(folders, concept) for concept in concepts]
    config = _checked(file.config, str(file.path)) if file else MergeConfig()
    changes = {
        "concepts": tuple(concepts),
        "base": options.base or "",
        **given(method=options.method),
    }
    return config.model_copy(update=changes), adapter


def _again(file: MergeFile | None, options: MergeOptions) -> tuple[MergeConfig, bool]:
    """The merge that ``options.from_file`` records. The file is untrusted: only its LoRAs are read,
    and no base is downloaded."""
    path = options.from_file
    assert path is not None
    if options.concept or (file is not None and file.entries):
        raise UsageError("Give the LoRAs with --concept, or a merged file with --from.")
    for name in given(preset=options.preset, method=options.method):
        raise UsageError(
            f"--{name} does not work with --from, which already has all settings; change single "
            "ones with --set."
        )
    try:
        config = _checked(read_recipe(path), str(path))
    except SettingsError as error:
        raise RecipeError(f"The recipe is not of this version: {error}") from error
    folders = _folders(options.loras, path)
    base = options.base or ""
    if not base and (config.base or find_method(config.method).needs_host):
        base = _base_in(folders, config.base)
    check_cut(config.cut)
    concepts = tuple(found_in(folders, concept) for concept in config.concepts)
    return config.model_copy(update={"base": base, "concepts": concepts}), False


def read_recipe(path: Path) -> MergeConfig:
    """The recipe in a merged file. Raises :class:`IterisError` if there is none or it is broken."""
    recorded = parse_object(read_tensors(path)[1].get("iteris"))
    missing = [name for name in _WHOLE if recorded.get(name) is None]
    known = ConceptConfig.key_names()
    try:
        if missing:
            raise MergeFileError(f"it has no {missing[0]}")
        data = {name: recorded[name] for name in (*_WHOLE, *_AFTER) if name in recorded}
        if isinstance(data["concepts"], list):
            data["concepts"] = [
                {key: entry[key] for key in entry if key in known}
                if isinstance(entry, dict)
                else entry
                for entry in data["concepts"]
            ]
        return MergeConfig.from_dict(data, "recipe")
    except (MergeFileError, ConceptError) as error:
        raise RecipeError(
            f"{path} has no complete merge recipe in its metadata ({error}); it was not written "
            "by iteris merge, or another tool saved it without its metadata."
        ) from error


def _checked(config: MergeConfig, where: str) -> MergeConfig:
    """``config`` from a file, with its settings checked; strings among them are parsed as on the
    command line."""
    kinds = {"settings": find_method(config.method).settings, "calibration": Calibration}
    changes = {
        name: check_settings(kind, getattr(config, name), f"{where}: {name}")
        for name, kind in kinds.items()
    }
    return config.model_copy(update=changes)


def _folders(loras: Path | None, file: Path) -> list[Path]:
    """The folders in which to look for the files that ``file`` names."""
    if loras is None:
        return [file.parent, Path()]
    below = sorted(path for path in loras.rglob("*") if path.is_dir())
    return [loras, file.parent, Path(), *below]


def _base_in(folders: Sequence[Path], base: str) -> str:
    if base in BUNDLED:
        return base
    local = base and PureWindowsPath(base).name == base
    for folder in folders if local else ():
        if (folder / base).exists():
            return str(folder / base)
    was = f"It was merged on {base}, which was not found" if base else "The file names none"
    raise RecipeError(f"There is no base to merge on. {was}; give BASE before --from.")


def merge_file_of(
    config: MergeConfig, output: Path, others: Mapping[str, Any], ending: str
) -> dict[str, Any]:
    """The content of the merge file ``output`` for ``config``, with its ``others`` options."""

    def name(path: Path) -> str:
        return relative_name(path, output.parent)

    base = config.base and name(Path(config.base))
    data = config.model_copy(update={"base": base}).to_dict(name, usual=False)
    last = {key: data.pop(key) for key in KEYS[1:] if key in data}
    return {**data, "output": output.stem + ending, **others, **last}
