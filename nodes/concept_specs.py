"""The nodes' concepts, before there is a MODEL for which to read their LoRA files."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ..iteris_core.concepts import PromptKind, lines_of
from ..iteris_core.config import ConceptConfig
from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files import read_header
from ..iteris_core.lora_files.metadata import sidecars

DENOISER = "unet"
"""The component name of a MODEL in site names."""

ALWAYS = "always on"
Kind = PromptKind | Literal["lines", "file", "always on"]
KINDS = (*get_args(PromptKind), "lines", "file", ALWAYS)
"""The source of prompts: templates by kind, lines from the user, or a file; a speed LoRA has
none."""

_PROMPTS = ".prompts.txt"
_BETWEEN = re.compile(r",\s*,|[;|\n]")


def make_spec(
    file: Path,
    *,
    prompts: str = "",
    kind: Kind = "subject",
    phrases: Sequence[str] = (),
    embedding: str = "",
    **fields: Any,
) -> ConceptConfig:
    """``fields`` are :class:`ConceptConfig`'s. Without ``phrases``, trigger or class word, the
    words come from the file or the notes beside it. An embedding stands for the trigger, or for all
    phrases of a file with several. A LoRA that is :data:`ALWAYS` on becomes part of the merged
    LoRA."""
    lines = _prompts_beside(file) if kind == "file" else lines_of(prompts)
    made_for = kind if kind not in ("lines", "file", ALWAYS) else "subject"
    files = [one for one in (file, fields.get("low")) if one is not None]
    newest = max(map(changed, files))
    spec = ConceptConfig(file=file, kind=made_for, source="you", changed=newest, **fields)
    if kind == ALWAYS:
        return spec.model_copy(update={"always_on": "include"})
    if not spec.phrases:
        spec = (
            spec.called(phrases, "you") if phrases else spec.with_found_words(read_header(file)[1])
        )
    if embedding:
        spec = spec.model_copy(update={"trigger": f"embedding:{embedding}", "subjects": ()})
    return spec.model_copy(update={"prompts": filled(lines, spec.phrases, file) or None})


def filled(lines: Sequence[str], phrases: Sequence[str], file: Path) -> tuple[str, ...]:
    """``lines`` with every phrase in place of their ``{}``."""
    if not phrases and any("{}" in line for line in lines):
        raise IterisError(
            f"The prompts of {file.name} contain {{}}, but the LoRA has no trigger words to "
            "insert; type them."
        )
    return tuple(
        line.replace("{}", phrase)
        for line in lines
        for phrase in (phrases if "{}" in line else [""])
    )


def phrases_in(text: str) -> list[str]:
    """The phrases of a text, separated by ``;``, ``|``, two commas or a new line."""
    return [phrase.strip(" ,") for phrase in _BETWEEN.split(text) if phrase.strip(" ,")]


def changed(file: Path) -> int:
    """The time stamp of a LoRA file, or of a newer file beside it: embeddings, trigger words,
    prompts."""
    beside = list(file.parent.glob(f"{glob.escape(file.stem)}_*.safetensors"))
    beside += [*sidecars(file), *filter(Path.is_file, [_prompts_file(file)])]
    return max(path.stat().st_mtime_ns for path in (file, *beside))


def _prompts_file(file: Path) -> Path:
    return file.with_name(file.stem + _PROMPTS)


def _prompts_beside(file: Path) -> list[str]:
    path = _prompts_file(file)
    try:
        lines = lines_of(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise IterisError(
            f"There is no file {path.name} beside {file.name} for its prompts; create it with one "
            "prompt per line, or choose another kind of prompts."
        ) from error
    if not lines:
        raise IterisError(f"{path.name} is empty; write one prompt per line.")
    return lines
