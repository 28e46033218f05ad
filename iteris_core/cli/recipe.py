"""Run a merge again from the metadata of the file that it wrote."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, get_args

from ..errors import IterisError, RecipeError, SettingsError
from ..lora_files import read_tensors
from ..lora_files.metadata import parse_object
from ..lora_files.tensors import file_digest
from ..merge import MergeResult, Unmergeable
from ..report.provenance import cut_lora, scaled_lora
from ..settings import Settings
from .concept_options import KEYS, ConceptOption, concept_of

_UNRECORDED: Mapping[str, Any] = {"cut": {}, "base": "", "unmergeable": "refuse"}
"""What a recipe holds only where the file was cut, or written by ``iteris merge``."""
_KINDS: Mapping[str, type] = {
    **{"method": str, "settings": dict, "calibration": dict, "concepts": list, "cut": dict},
    **{"base": str, "unmergeable": str},
}


@dataclass(frozen=True)
class Recipe:
    """``concepts`` are the entries of the ``iteris`` metadata, see :func:`..provenance.recipe`;
    ``folders`` is where their files are looked for; ``cut`` is what :func:`..provenance.with_cut`
    wrote there and the ``strength`` of :func:`..provenance.scaled_lora`, or empty; ``base`` and
    ``unmergeable`` what :func:`..provenance.with_run` did."""

    method: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    concepts: Sequence[Mapping[str, Any]]
    folders: Sequence[Path]
    cut: Mapping[str, Any]
    base: str = ""
    unmergeable: Unmergeable = "refuse"

    def base_found(self) -> str:
        """The base in one of the folders. A file may be anybody's: what it names is not fetched."""
        local = self.base and PureWindowsPath(self.base).name == self.base
        for folder in self.folders if local else ():
            if (folder / self.base).exists():
                return str(folder / self.base)
        was = f"It was merged on {self.base}, which is not here" if self.base else "It names none"
        raise RecipeError(f"There is no base to merge on. {was}; say BASE in front of --from.")

    def over(
        self,
        what: Literal["settings", "calibration"],
        given: Mapping[str, Any],
        kind: type[Settings],
    ) -> dict[str, Any]:
        """What is recorded, with what the command line says over it."""
        try:
            kind.from_mapping(getattr(self, what))
        except SettingsError as error:
            are = "is" if what == "calibration" else "are"
            raise RecipeError(f"The recipe's {what} {are} not of this version: {error}") from error
        return {**getattr(self, what), **given}


def read_recipe(path: Path, loras: Path | None = None) -> Recipe:
    """The recipe in a merged file, whose LoRAs are in the folder ``loras``, beside the merged file,
    or in the current folder. Raises :class:`IterisError` if there is none or it is broken."""
    _, metadata = read_tensors(path)
    found: dict[str, Any] = {**_UNRECORDED, **parse_object(metadata.get("iteris"))}
    whole = all(isinstance(found.get(name), kind) for name, kind in _KINDS.items())
    whole = whole and found["unmergeable"] in get_args(Unmergeable)
    if not whole or not all(isinstance(concept, dict) for concept in found["concepts"]):
        raise RecipeError(
            f"{path} has no whole recipe of a merge in its metadata; it was not written by iteris "
            "merge, or another tool saved it without its metadata."
        )
    folders = [*([loras] if loras is not None else []), path.parent, Path()]
    after: dict[str, Any] = dict(found["cut"])
    if "strength" in found:
        after["strength"] = _number(found["strength"])
    found["cut"] = after
    return Recipe(**{name: found[name] for name in _KINDS}, folders=folders)


def check_cut(cut: Mapping[str, Any]) -> None:
    """Raise :class:`IterisError` for a cut that :func:`cut_again` could not make."""
    _number(cut.get("strength", 1.0))
    rank, ordered = cut.get("rank", 1), cut.get("ordered", True)
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    unknown = cut.keys() - {"rank", "ordered", "strength"}
    if (
        unknown
        or not whole
        or not isinstance(ordered, bool)
        or ("rank" in cut) != ("ordered" in cut)
    ):
        raise RecipeError(
            f"The cut {dict(cut)} is broken: it takes rank, a whole number of at least 1, with "
            "ordered, true or false, beside it; and strength, a number."
        )


def cut_again(cut: Mapping[str, Any], result: MergeResult) -> MergeResult:
    """``result`` at the strength and the rank to which the file was brought after its merge."""
    check_cut(cut)
    result = replace(result, lora=scaled_lora(result.lora, cut.get("strength", 1.0)))
    if "rank" not in cut:
        return result
    return replace(result, lora=cut_lora(result.lora, cut["rank"], ordered=cut["ordered"]))


def _number(strength: Any) -> float:
    number = isinstance(strength, int | float) and not isinstance(strength, bool)
    if not number or not math.isfinite(strength):
        raise RecipeError(f"The recipe has a broken strength {strength!r}; give a finite number.")
    return strength


def concepts_of(recipe: Recipe) -> list[ConceptOption]:
    """The concepts, with every file found again and held against its recorded hash."""
    found: list[ConceptOption] = []
    for entry in recipe.concepts:
        try:
            known = {key: value for key, value in entry.items() if key in KEYS}
            option = concept_of(known, "it", find=None)
        except IterisError as error:
            raise RecipeError(f"The recipe has a broken concept {dict(entry)}: {error}") from error
        found.append(found_in(recipe.folders, option))
    return found


def found_in(folders: Sequence[Path], option: ConceptOption) -> ConceptOption:
    """``option`` with its files in one of ``folders``."""
    digests = option.sha256.split("+")
    pairs = itertools.zip_longest(option.files, digests, fillvalue="")
    files = [find_file(folders, str(name), digest) for name, digest in pairs if name]
    return replace(option, **dict(zip(("file", "low"), files, strict=False)))


def find_file(folders: Sequence[Path], name: str, digest: str) -> Path:
    """The file in one of ``folders``, by its recorded name or its last part, or under
    a whole path that it records; its content must be the same."""
    names = dict.fromkeys((name, PureWindowsPath(name).name))  # either kind of slash
    candidates = [folder / some for folder in folders for some in names]
    present = [path for path in candidates if path.exists()]
    for path in present:
        if not digest or (path.is_file() and file_digest(path) == digest):
            return path
    if present:
        raise RecipeError(f"{present[0]} is not the file that was merged: its SHA-256 differs.")
    places = ", ".join(str(folder) for folder in dict.fromkeys(folders))
    raise RecipeError(
        f"{name} is in none of the folders {places}; say with --loras in which folder it is."
    )
