"""The nodes' concepts, before there is a MODEL for which to read their LoRA files; other packs'
stacks as concepts."""

from __future__ import annotations

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import folder_paths

from ..iteris_core.concepts import Concept, PromptKind, lines_of
from ..iteris_core.errors import IterisError
from ..iteris_core.lora_files import read_header
from ..iteris_core.lora_files.embeddings import sidecar_files
from ..iteris_core.lora_files.metadata import sidecars
from .schema import NONE

DENOISER = "unet"
"""The component name of a MODEL in site names."""

ALWAYS = "always on"
AUTO = "auto"
Kind = PromptKind | Literal["auto", "lines", "always on"]
KINDS = (AUTO, *get_args(PromptKind), "lines", ALWAYS)
"""The source of prompts: templates by kind (of what the file says of itself), or the user's lines;
a LoRA that acts on every prompt has none."""

_BETWEEN = re.compile(r",\s*,|[;|\n]")


def make_spec(
    file: Path,
    *,
    prompts: str = "",
    kind: Kind = AUTO,
    phrases: Sequence[str] = (),
    embedding: str = "",
    **fields: Any,
) -> Concept:
    """``fields`` are :class:`Concept`'s. What is not given comes from the file or the notes
    beside it, see :func:`.concepts.recognised`. An embedding stands for the trigger, or for all
    phrases of a file with several. A LoRA that is :data:`ALWAYS` on becomes part of the merged
    LoRA."""
    if kind not in KINDS:
        raise IterisError(f"{kind} is no kind of prompts; they are {', '.join(KINDS)}.")
    lines = lines_of(prompts)
    if kind == ALWAYS:
        fields["always_on"] = "include"
    elif kind != AUTO or lines:
        fields["kind"] = kind if kind in get_args(PromptKind) else "subject"
    files = [one for one in (file, fields.get("low")) if one is not None]
    spec = Concept(file=file, source="you", changed=max(map(changed, files)), **fields)
    if phrases:
        spec = spec.called(phrases, "you")
    spec = spec.with_found_words(read_header(file)[1])
    if spec.always_on != "no":
        return spec
    if embedding:
        spec = replace(spec, trigger=f"embedding:{embedding}", subjects=())
    return replace(spec, prompts=filled(lines, spec.phrases, file) or None)


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
    """The time stamp of a LoRA file, or of a newer one with its embeddings."""
    return max(path.stat().st_mtime_ns for path in (file, *sidecar_files(file)))


def fingerprint(name: str | None) -> Any:
    """What changes whenever the LoRA ``name`` is to be read again, with the notes beside it. Their
    words are in its :class:`Concept`, so other notes do not merge it again."""
    if name in (None, NONE):
        return None
    try:
        file = lora_path(name)
    except IterisError as error:
        return str(error)
    return changed(file), [path.stat().st_mtime_ns for path in sidecars(file)]


_FIELDS: Sequence[tuple[Sequence[str], Any]] = (
    (("name", "lora_name", "lora", "file", "path"), str),
    (("strength", "strength_model", "model_strength", "model_weight", "weight"), (int, float)),
    (("clip_strength", "strength_clip", "strengthTwo", "clip_weight"), (int, float)),
)
"""Other packs' names of a LoRA, of its strength and of that for CLIP, and their types."""
_ON = ("on", "enabled", "active")


def lora_path(name: str) -> Path:
    """The LoRA ``name`` in models/loras, with either kind of slash, with or without its extension
    or folders. Raises :class:`IterisError` if there is none."""
    if path := folder_paths.get_full_path("loras", name):
        return Path(path)
    ours = name.replace("\\", "/")
    for known in folder_paths.get_filename_list("loras"):
        whole = known.replace("\\", "/")
        parts = {whole, whole.rpartition("/")[2]}
        parts |= {part.rpartition(".")[0] for part in parts}
        path = folder_paths.get_full_path("loras", known)
        if path is not None and (ours in parts or ours.endswith(f"/{whole}")):
            return Path(path)
    raise IterisError(f"There is no LoRA {name} in models/loras; has it been moved or renamed?")


@contextmanager
def rows_named(concepts: Sequence[Concept]) -> Generator[None]:
    """Context in which an error about LoRA files of ``concepts`` begins with their rows."""
    try:
        yield
    except IterisError as error:
        said = str(error)
        about = [one for one in concepts if any(_is_in(said, file) for file in one.files)]
        if (rows := rows_of(about)) and not said.startswith("Row"):
            error.args = (f"{rows.capitalize()}: {said}",)
        raise


def _is_in(text: str, file: Path) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(file.name)}", text) is not None


def rows_of(concepts: Sequence[Concept]) -> str:
    """Such as "rows 1 and 3"; empty for concepts of other nodes than IterIS LoRAs."""
    rows = [str(one.row) for one in concepts if one.row]
    if len(rows) < 2:
        return f"row {rows[0]}" if rows else ""
    return f"rows {', '.join(rows[:-1])} and {rows[-1]}"


def specs_of(value: Any) -> tuple[Concept, ...]:
    """Concepts unchanged, and every LoRA of a LORA_STACK with its known trigger words."""
    given = [one for one in value or () if one is not None]  # core's rows may have gaps
    made = (one if isinstance(one, Concept) else _spec(one) for one in given)
    return tuple(spec for spec in made if spec is not None)


def _spec(entry: Any) -> Concept | None:
    """A stack's (name, strength[, clip strength]) or dictionary; None if off or nameless."""
    values: Mapping[str, Any] = {}
    if isinstance(entry, Mapping):
        values = entry
    elif isinstance(entry, (list, tuple)) and all(
        value is None or isinstance(value, (int, float)) for value in entry[1:3]
    ):
        values = dict(zip(("name", "strength", "clip_strength"), entry, strict=False))
    if not all(values.get(name, True) for name in _ON):
        return None
    name, strength, clip = (
        next((values[n] for n in names if isinstance(values.get(n), kind)), None)
        for names, kind in _FIELDS
    )
    if name is None:
        keys = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise IterisError(
            f"The LORA_STACK has an entry in an unknown format ({keys}); expected is (name, "
            "strength, clip strength) or a dictionary with name and strength."
        )
    if name in ("", "None", NONE):
        return None
    strength = 1.0 if strength is None else float(strength)
    return make_spec(lora_path(name), strength=strength, text_strength=clip)
