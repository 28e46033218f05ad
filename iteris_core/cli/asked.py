"""What ``iteris merge`` is asked for, on the command line, in a merge file or in a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..concepts import Calibration
from ..errors import UsageError
from ..merge import Unmergeable
from ..methods import find_method
from ..methods.registry import Method
from .adapters import is_model
from .concept_options import ConceptOption, first_name, parse_concept
from .merge_file import MergeFile, relative_name
from .options import parse_settings
from .recipe import Recipe, concepts_of


@dataclass(frozen=True)
class Asked:
    """``adapter``: the base is a single model of transformers, and the concepts are adapters of
    peft. ``cut`` is as in :class:`.recipe.Recipe`."""

    base: str
    method: Method
    settings: Mapping[str, Any]
    calibration: Mapping[str, Any]
    concepts: Sequence[ConceptOption]
    unmergeable: Unmergeable
    adapter: bool = False
    cut: Mapping[str, Any] | None = None

    def to_merge_file(self, output: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        """The merge file ``output`` that asks for the same, with other ``options`` beside it."""
        folder = output.parent

        def name(path: Path) -> str:
            return relative_name(path, folder)

        calibration = dict(self.calibration)
        if "templates" in calibration:
            calibration["templates"] = list(calibration["templates"])
        return {
            "base": name(Path(self.base)),
            "output": output.stem + ("" if self.adapter else ".safetensors"),
            "method": self.method.name,
            "unmergeable": self.unmergeable,
            **options,
            "concepts": [concept.to_dict(name) for concept in self.concepts],
            "settings": dict(self.settings),
            "calibration": calibration,
            **({"cut": dict(self.cut)} if self.cut else {}),
        }


def ask_again(
    recipe: Recipe,
    base: str | None,
    pairs: Sequence[str],
    calibration: Mapping[str, Any],
    unmergeable: Unmergeable | None,
) -> Asked:
    """What a merged file records, with what the command line says over it."""
    method = find_method(recipe.method)
    settings, more = parse_settings(method.settings, pairs)
    return Asked(
        base if base is not None else recipe.base_found(),
        method,
        recipe.over("settings", settings, method.settings),
        recipe.over("calibration", {**more, **calibration}, Calibration),
        concepts_of(recipe),
        unmergeable or recipe.unmergeable,
        cut=recipe.cut,
    )


def ask(
    file: MergeFile,
    base: str | None,
    method: str,
    concepts: Sequence[str],
    loras: Path | None,
    pairs: Sequence[str],
    calibration: Mapping[str, Any],
    unmergeable: Unmergeable | None,
) -> Asked:
    """What the command line says, over what the merge file does."""
    if not concepts and not file.concepts and file.path is not None:
        raise UsageError(
            f"{file.path} has no LoRAs: list them under concepts:, or give them with --concept."
        )
    if not concepts and not file.concepts:
        raise UsageError("Give the LoRAs with --concept, or a merged file with --from.")
    if base is None:
        raise UsageError("Name the base: BASE on the command line, or base: in the merge file.")
    chosen = find_method(method)
    settings, of_file = file.checked(chosen.settings)
    more, sampling = parse_settings(chosen.settings, pairs)
    adapter = is_model(base, [first_name(t) for t in concepts] or file.folders())
    if concepts:
        options = [parse_concept(text, adapter=adapter) for text in concepts]
    else:
        options = file.concept_options(loras, adapter=adapter)
    return Asked(
        base,
        chosen,
        {**settings, **more},
        {**of_file, **sampling, **calibration},
        options,
        unmergeable or "refuse",
        adapter,
        file.cut,
    )


def with_preserved(asked: Asked, prompts: Sequence[str], weight: float) -> Asked:
    """``asked`` with prompts on which the base is to stay as it is."""
    kept = ConceptOption(trigger="preserve", prompts=prompts, weight=weight)
    return replace(asked, concepts=[*asked.concepts, kept])
