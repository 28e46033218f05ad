"""The options of ``iteris merge``, and the merge that they request: the command line overrides a
merge file, or the recipe in a merged file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from ..concepts import Calibration, over
from ..config import ConceptConfig, MergeConfig, Unmergeable
from ..errors import ConceptError, MergeFileError, RecipeError, SettingsError, UsageError
from ..lora_files import Layout, read_tensors
from ..lora_files.metadata import parse_object
from ..methods import find_method
from . import options as shared
from .base import BUNDLED
from .common import warn
from .inputs import read_lines
from .merge_file import MergeFile, found_in, parse_concept, use_merge_file
from .options import BASE, RESULT, argument, check_settings, given, offered, parse_settings

_WHOLE = ("method", "settings", "calibration", "concepts")
"""Keys of every recipe."""
_OF_RUN = ("base", "unmergeable")
"""Extra keys, in files that ``iteris merge`` wrote."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """One field per option, with the option's name, in the order of the help."""

    output: Path = offered("The .safetensors to write", "--output", "-o", default=...)
    base: str | None = argument(
        "A diffusers pipeline (a folder, a .safetensors, a hub name), or a merge file "
        "(.yaml), which can set every option. Methods that look at weights only, such as "
        "average, need none.",
        metavar="BASE",
        is_eager=True,
        callback=use_merge_file,
        default=None,
    )
    concept: list[str] | None = offered(shared.CONCEPT_HELP)
    preset: shared.Preset = None
    overwrite: shared.Overwrite = False
    plan: bool = offered("Check everything, show the plan, and stop", "--plan", default=False)
    quiet: bool = offered("Show nothing but errors", "--quiet", "-q", panel=RESULT, default=False)
    method: str | None = offered(
        "Default: iteris; the command iteris methods lists all",
        autocompletion=shared.method_names,
        panel=shared.METHOD,
    )
    setting: list[str] | None = offered(
        "NAME=VALUE for the method or the calibration, such as rank=16, guidance=2.5; iteris "
        "methods lists all",
        "--set",
        autocompletion=shared.setting_names,
        panel=shared.METHOD,
    )
    from_file: Path | None = offered(
        "Repeat the merge that wrote this file; by default BASE is looked up beside it",
        "--from",
        panel=shared.AGAIN,
    )
    loras: Path | None = offered(
        "With --from or a merge file: a folder above the LoRAs, if they are not beside it",
        panel=shared.AGAIN,
    )
    templates: Path | None = offered(
        "A text file of prompt templates, with {} for the concept",
        panel=shared.CALIBRATION,
    )
    layout: Layout | None = offered(
        "Naming scheme of the file; default: kohya, or peft if the base has no kohya names",
        panel=RESULT,
    )
    dtype: shared.Dtype = offered("Type of the file", panel=RESULT, default="float16")
    image: Path | None = offered("Input image of the base: to edit, to start from, …", panel=BASE)
    mask_image: Path | None = offered("Mask of --image, for an inpainting base", panel=BASE)
    device: shared.Device = None
    base_dtype: shared.BaseDtype = None
    offload: shared.Offload = None
    memory: shared.Memory = None
    store: shared.Store = None
    allow_partial: shared.Partial = False
    unmergeable: Unmergeable | None = offered(
        "For layers whose features cannot be collected: refuse (default), skip them, or use "
        "the LoRAs' mean",
        panel=shared.READING,
    )
    energy: shared.Energy = 0.999
    as_json: shared.AsJson = False
    card: bool = offered(
        "Also write a card (.md): trigger words, sources, verdict and recipe",
        "--card",
        panel=RESULT,
        default=False,
    )


def requested(
    file: MergeFile | None, options: MergeOptions, calibration: Mapping[str, Any]
) -> MergeConfig:
    """The merge. Raises :class:`IterisError` for anything missing, unknown or broken."""
    config = (_again if options.from_file else _written)(file, options)
    kind = find_method(config.method).settings
    settings, of_pairs = parse_settings(kind, options.setting or [])
    lines = read_lines(options.templates) if options.templates else None
    changes: dict[str, Any] = {
        "settings": {**config.settings, **settings},
        "calibration": over(
            config.calibration, {**of_pairs, **calibration, **given(templates=lines)}
        ),
        **given(unmergeable=options.unmergeable, preset=options.preset),
    }  # fmt: skip
    return config.model_copy(update=changes)


def _written(file: MergeFile | None, options: MergeOptions) -> MergeConfig:
    """The concepts from the command line or the merge ``file``, and its other keys."""
    if not options.concept and not (file and file.entries):
        raise UsageError(
            f"{file.path} has no LoRAs: list them under concepts:, or give them with --concept."
            if file
            else "Give the LoRAs with --concept, or a merged file with --from."
        )
    if file is None and options.loras is not None:
        raise UsageError("--loras is for --from; --concept already names the LoRA files.")
    if options.base is None and find_method(options.method or "iteris").needs_host:
        raise UsageError("Name the base: BASE on the command line, or base: in the merge file.")
    if options.concept or file is None:
        concepts = tuple(map(parse_concept, options.concept or ()))
    else:
        folders = _folders(options.loras, file.path)
        concepts = tuple(found_in(folders, concept) for concept in file.concepts())
    config = _checked(file.config, str(file.path)) if file else MergeConfig()
    changes = {"concepts": concepts, "base": options.base or "", **given(method=options.method)}
    return config.model_copy(update=changes)


def _again(file: MergeFile | None, options: MergeOptions) -> MergeConfig:
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
    concepts = tuple(found_in(folders, concept) for concept in config.concepts)
    return config.model_copy(update={"base": base, "concepts": concepts})


def read_recipe(path: Path) -> MergeConfig:
    """The recipe in a merged file. Raises :class:`IterisError` if there is none or it is broken."""
    recorded = parse_object(read_tensors(path)[1].get("iteris"))
    try:
        if missing := [name for name in _WHOLE if recorded.get(name) is None]:
            raise MergeFileError(f"it has no {missing[0]}")
        data = {name: recorded[name] for name in (*_WHOLE, *_OF_RUN) if name in recorded}
        if isinstance(data["concepts"], list):
            data["concepts"] = list(map(_concept_in, data["concepts"]))
        config = MergeConfig.from_dict(data, "recipe")
    except (MergeFileError, ConceptError) as error:
        raise RecipeError(
            f"{path} has no complete merge recipe in its metadata ({error}); it was not written "
            "by iteris merge, or another tool saved it without its metadata."
        ) from error
    later = {name: recorded[name] for name in ("cut", "strength") if recorded.get(name)}
    if later:
        warn(f"{path} was changed after its merge ({later}); the merge itself is repeated.")
    return config


def _concept_in(entry: Any) -> Any:
    """A recipe's concept, without what the recipe only tells about it."""
    known = ConceptConfig.key_names()
    return {k: v for k, v in entry.items() if k in known} if isinstance(entry, dict) else entry


def _checked(config: MergeConfig, where: str) -> MergeConfig:
    """``config`` from a file, with its settings checked and parsed as on the command line."""
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
