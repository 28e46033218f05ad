"""The options of ``iteris merge``, and the merge that they request: the command line overrides a
merge file, or the recipe in a merged file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from ..calibration import Calibration, over
from ..concepts import CONCEPT_KEYS, Concept
from ..config import MergeConfig, Unmergeable
from ..errors import ConceptError, MergeFileError, RecipeError, SettingsError, UsageError
from ..lora_files import Layout, read_tensors
from ..lora_files.metadata import parse_object
from ..methods import find_method
from ..report.provenance import without_files
from . import options as shared
from .base import BUNDLED
from .common import warn
from .inputs import read_lines
from .merge_file import found_in, parse_concept, use_merge_file
from .options import BASE, RESULT, argument, check_settings, offered, parse_settings, passed

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
    file: tuple[Path, MergeConfig] | None, options: MergeOptions, calibration: Mapping[str, Any]
) -> MergeConfig:
    """The merge: the command line over a merge ``file`` over a recipe. Raises :class:`IterisError`
    for anything missing, unknown or broken. A recipe is untrusted: only its LoRAs are read, and no
    base is downloaded."""
    path, of_file = file or (Path(), MergeConfig())
    if options.from_file is not None:
        if options.concept or of_file.concepts:
            raise UsageError("Give the LoRAs with --concept, or a merged file with --from.")
        for name in passed(preset=options.preset, method=options.method):
            raise UsageError(
                f"--{name} does not work with --from, which already has all settings; change "
                "single ones with --set."
            )
        path, config = options.from_file, read_recipe(options.from_file)
    elif not options.concept and not of_file.concepts:
        raise UsageError(
            "Give the LoRAs with --concept, or a merged file with --from."
            if file is None
            else f"{path} has no LoRAs: list them under concepts:, or give them with --concept."
        )
    elif file is None and options.loras is not None:
        raise UsageError("--loras is for --from; --concept already names the LoRA files.")
    else:
        config = MergeConfig(concepts=of_file.concepts, method=options.method or "iteris")
    method = find_method(config.method)
    folders = [path.parent, Path()]
    if options.loras is not None:
        below = sorted(path for path in options.loras.rglob("*") if path.is_dir())
        folders = [options.loras, *folders, *below]
    base = options.base or ""
    if not base and (config.base or method.needs_host):
        if options.from_file is None:
            raise UsageError("Name the base: BASE on the command line, or base: in the merge file.")
        base = _base_in(folders, config.base)
    concepts = (
        tuple(map(parse_concept, options.concept))
        if options.concept
        else tuple(found_in(folders, concept) for concept in config.concepts)
    )
    if file is not None:
        of_file = _checked(of_file, config.method, str(file[0]))
    settings, of_pairs = parse_settings(method.settings, options.setting or [])
    lines = read_lines(options.templates) if options.templates else None
    of_line = {**of_pairs, **calibration, **passed(templates=lines)}
    changes: dict[str, Any] = {
        "base": base,
        "concepts": concepts,
        "settings": {**config.settings, **of_file.settings, **settings},
        "calibration": over(over(config.calibration, of_file.calibration), of_line),
        **passed(unmergeable=options.unmergeable, preset=options.preset),
    }
    return config.model_copy(update=changes)


def read_recipe(path: Path) -> MergeConfig:
    """The recipe in a merged file. Raises :class:`IterisError` if there is none or it is broken."""
    metadata = read_tensors(path)[1]
    recorded = parse_object(metadata.get("iteris"))
    try:
        if missing := [name for name in _WHOLE if recorded.get(name) is None]:
            raise MergeFileError(f"it has no {missing[0]}")
        data = {name: recorded[name] for name in (*_WHOLE, *_OF_RUN) if name in recorded}
        if isinstance(data["concepts"], list):  # without what it only tells of a concept
            if loose := without_files(metadata):
                raise RecipeError(
                    f"{path} cannot be merged again: its LoRA {loose[0]!r} was made in Python and "
                    "is in no file."
                )
            data["concepts"] = [
                {key: value for key, value in entry.items() if key in CONCEPT_KEYS}
                if isinstance(entry, dict)
                else entry
                for entry in data["concepts"]
            ]
        config = MergeConfig.from_dict(data, "recipe")
    except (MergeFileError, ConceptError) as error:
        raise RecipeError(
            f"{path} has no complete merge recipe in its metadata ({error}); it was not written "
            "by iteris merge, or another tool saved it without its metadata."
        ) from error
    config = config.model_copy(
        update={"concepts": tuple(_by_name(path, concept) for concept in config.concepts)}
    )
    later = {name: recorded[name] for name in ("cut", "strength") if recorded.get(name)}
    if later:
        warn(f"{path} was changed after its merge ({later}); the merge itself is repeated.")
    if partial := recorded.get("partial"):
        warn(f"{path} holds a merge that ended after {partial}; the whole merge is repeated.")
    try:
        return _checked(config, config.method, str(path))
    except SettingsError as error:
        raise RecipeError(f"The recipe is not of this version: {error}") from error


def _by_name(path: Path, concept: Concept) -> Concept:
    """``concept`` of the recipe in ``path``, with its files by their names alone: a recipe is
    untrusted, and a folder in it may be anybody's."""
    names = [Path(PureWindowsPath(file).name) for file in concept.files]
    if len([digest for digest in concept.sha256.split("+") if digest]) < len(names):
        raise RecipeError(
            f"{path} has no SHA-256 of {names[0]} in its recipe, so no file can be known to be the "
            "one that was merged; give the LoRAs with --concept."
        )
    return replace(concept, **dict(zip(("file", "low"), names, strict=False)))


def _checked(config: MergeConfig, method: str, where: str) -> MergeConfig:
    """``config`` from a file, with its settings checked and parsed as on the command line."""
    kinds = {"settings": find_method(method).settings, "calibration": Calibration}
    changes = {
        name: check_settings(kind, getattr(config, name), f"{where}: {name}")
        for name, kind in kinds.items()
    }
    return config.model_copy(update=changes)


def _base_in(folders: Sequence[Path], base: str) -> str:
    if base in BUNDLED:
        return base
    local = base and PureWindowsPath(base).name == base
    for folder in folders if local else ():
        if (folder / base).exists():
            return str(folder / base)
    was = f"It was merged on {base}, which was not found" if base else "The file names none"
    raise RecipeError(f"There is no base to merge on. {was}; give BASE before --from.")
