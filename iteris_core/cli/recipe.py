"""Run a merge again from the metadata of the file that it wrote."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

from ..concepts import Concept, Words, words_of
from ..errors import IterisError, SettingsError
from ..hosts.protocol import Host
from ..lora import Lora
from ..lora_files import ReadOptions, read_tensors
from ..lora_files.experts import joined_experts
from ..lora_files.metadata import parse_object
from ..lora_files.tensors import file_digest
from ..merge import MergeResult
from ..report.provenance import cut_lora, scaled_lora
from ..settings import Settings
from .options import ConceptOption, split_files


@dataclass(frozen=True)
class Recipe:
    """``concepts`` are the entries of the ``iteris`` metadata, see :func:`..provenance.recipe`;
    ``folders`` is where their files are looked for; ``cut`` is what :func:`..provenance.with_cut`
    wrote there, or empty; ``strength`` what :func:`..provenance.scaled_lora` multiplied by."""

    method: str
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    concepts: Sequence[Mapping[str, Any]]
    folders: Sequence[Path]
    cut: Mapping[str, Any]
    strength: float = 1.0

    def over(
        self,
        what: Literal["settings", "calibration"],
        given: Mapping[str, Any],
        kind: type[Settings],
    ) -> dict[str, Any]:
        """What is recorded, with what the command line says over it, under today's names."""
        try:
            return {**kind.canonical(getattr(self, what)), **kind.canonical(given)}
        except SettingsError as error:
            are = "is" if what == "calibration" else "are"
            raise IterisError(f"The recipe's {what} {are} not of this version: {error}") from error


def read_recipe(path: Path, loras: Path | None = None) -> Recipe:
    """The recipe in a merged file, whose LoRAs are in the folder ``loras``, beside the merged file,
    or in the current folder. Raises :class:`IterisError` if there is none or it is broken."""
    _, metadata = read_tensors(path)
    found: dict[str, Any] = {"cut": {}, **parse_object(metadata.get("iteris"))}
    kinds = {"method": str, "settings": dict, "calibration": dict, "concepts": list, "cut": dict}
    whole = all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    if not whole or not all(isinstance(concept, dict) for concept in found["concepts"]):
        raise IterisError(
            f"{path} has no whole recipe of a merge in its metadata; it was not written by iteris "
            "merge, or another tool saved it without its metadata."
        )
    folders = [*([loras] if loras is not None else []), path.parent, Path()]
    strength = found.get("strength", 1.0)
    if not isinstance(strength, int | float):
        raise IterisError(f"{path} has a recipe with a broken strength {strength!r}.")
    return Recipe(**{name: found[name] for name in kinds}, folders=folders, strength=strength)


def cut_again(recipe: Recipe, result: MergeResult) -> MergeResult:
    """``result`` at the strength and the rank to which the file was brought after its merge."""
    result = replace(result, lora=scaled_lora(result.lora, recipe.strength))
    if not recipe.cut:
        return result
    rank, ordered = recipe.cut.get("rank"), recipe.cut.get("ordered")
    if not isinstance(rank, int) or rank < 1 or not isinstance(ordered, bool):
        raise IterisError(f"The recipe has a broken cut {dict(recipe.cut)}.")
    return replace(result, lora=cut_lora(result.lora, rank, ordered=ordered))


def concepts_of(
    recipe: Recipe, host: Host, options: ReadOptions, renames: Sequence[str]
) -> list[Concept]:
    """The concepts, with every file found again, held against its recorded hash and read as it was
    then; ``options`` count where nothing is recorded, ``renames`` and a partial reading as well."""
    found: list[Concept] = []
    for entry in recipe.concepts:
        try:
            concept = _recorded(entry)
            recorded = entry.get("reading") or {}
            partial = bool(recorded.get("allow_partial")) or options.allow_partial
            reading = ReadOptions(partial, float(recorded.get("energy", options.energy)))
            again = [str(text) for text in recorded.get("rename", ())]
        except (AttributeError, TypeError, ValueError) as error:
            raise IterisError(f"The recipe has a broken concept {entry}: {error}.") from error
        if entry.get("file"):
            names = [str(name) for name in split_files(str(entry["file"])) if name is not None]
            digests = str(entry.get("sha256") or "").split("+")
            pairs = itertools.zip_longest(names, digests, fillvalue="")
            files = [_find(recipe, name, digest) for name, digest in pairs if name]
            lora = rename_embeddings(read_files(host, files, reading), [*again, *renames])
            concept = replace(concept, lora=lora)
        found.append(concept)
    return found


def _recorded(entry: Mapping[str, Any]) -> Concept:
    """A concept as it is recorded, without its LoRA."""
    prompts, text_strength = entry.get("prompts"), entry.get("text_strength")
    return Concept(
        None,
        prompts=None if prompts is None else [str(prompt) for prompt in prompts],
        trigger=str(entry.get("trigger") or ""),
        class_word=str(entry.get("class") or ""),
        strength=float(entry.get("strength", 1.0)),
        weight=float(entry.get("weight", 1.0)),
        text_strength=None if text_strength is None else float(text_strength),
        subjects=[str(subject) for subject in entry.get("subjects") or ()],
        kind=entry.get("kind", "subject"),
    )


def _find(recipe: Recipe, name: str, digest: str) -> Path:
    """The file in one of the recipe's folders, by its recorded name or its last part, or where an
    older recipe with a whole path says that it was; its content must be the same."""
    names = dict.fromkeys((name, PureWindowsPath(name).name))  # either kind of slash
    candidates = [folder / some for folder in recipe.folders for some in names]
    present = [path for path in candidates if path.is_file()]
    for path in present:
        if not digest or file_digest(path) == digest:
            return path
    if present:
        raise IterisError(f"{present[0]} is not the file that was merged: its SHA-256 differs.")
    places = ", ".join(str(folder) for folder in recipe.folders)
    raise IterisError(
        f"{name} is in none of the folders {places}; say with --loras in which folder it is."
    )


def read_files(host: Host, files: Sequence[Path], reading: ReadOptions) -> Lora:
    """The LoRA in one file, or in two of a model with two experts: for high noise and for low."""
    high, *others = [host.read_lora(file, reading) for file in files]
    if not others:
        return high
    experts = getattr(host, "experts", None)
    if not experts:
        raise IterisError(f"{files[1]}: the base has one denoiser; give one file for a concept.")
    return joined_experts(high, others[0], experts)


def read_concepts(
    options: Sequence[ConceptOption], host: Host, reading: ReadOptions, renames: Sequence[str]
) -> list[Concept]:
    """The concepts of the command line; where neither trigger nor class word is given, the words
    that the file's metadata have."""
    found: list[Concept] = []
    for option in options:
        files = [option.file, *([option.low] if option.low else [])]
        lora = read_files(host, files, reading)
        words = Words(option.trigger, option.class_word)
        if words == Words():
            words = words_of(lora.metadata)
        found.append(
            Concept(
                rename_embeddings(lora, renames),
                **words._asdict(),
                strength=option.strength,
                text_strength=option.text_strength,
            )
        )
    return found


def rename_embeddings(lora: Lora, renames: Sequence[str]) -> Lora:
    """``renames`` are LORA:NAME=NEW, or NAME=NEW for every LoRA."""
    if not renames:
        return lora
    names = {name: name for name in lora.embeddings}
    for text in renames:
        left, equals, new = text.partition("=")
        owner, colon, old = left.rpartition(":")
        if not equals or not new or not old:
            raise IterisError(f"--rename {text!r} is not LORA:NAME=NEW or NAME=NEW.")
        if old in names and (not colon or owner == lora.name):
            names[old] = new
    if len(set(names.values())) < len(names):
        raise IterisError(f"{lora.name}: two embeddings would have one name: {names}.")
    renamed = {names[name]: parts for name, parts in lora.embeddings.items()}
    return replace(lora, embeddings=renamed, reading={**lora.reading, "rename": list(renames)})
